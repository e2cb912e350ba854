"""The learning rate over a run: a section for every schedule of optax, each after the same linear warm-up.

::

    rate(t) = peak * (s + (1 - s) t / W)    for t < W: warmup_steps, or warmup_ratio of all steps; s = warmup_start
            = peak * shape(t - W)           from there on, and beyond the end of the run

An optimizer may have several learning rates, so values are shares of the peak, which is the highest of each. Lengths
count from the end of the warm-up and default to the steps left there. The functions are optax's; ``inverse_sqrt``,
which it lacks, is that of ``transformers`` (``get_inverse_sqrt_schedule``), and ``wsd`` joins what optax has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from msgspec import Meta

from stablelora_jax.config.engine import Section
from stablelora_jax.config.keys import NonNegativeInt, PositiveFloat, PositiveInt, option
from stablelora_jax.config.members import arguments_of, member
from stablelora_jax.utils.errors import InputError

Share = Annotated[float, Meta(ge=0, le=1)]
NotZero = Annotated[float, Meta(gt=0, le=1)]
Inside = Annotated[float, Meta(gt=0, lt=1)]
End = Annotated[Share, Meta(description="share of the peak that it comes down to")]
Hold = Annotated[NonNegativeInt, Meta(description="steps at the peak before")]
Exponent = Annotated[PositiveFloat, Meta(description="power of the cosine's part, before end is added")]
Decay = Annotated[
    PositiveInt | None,
    Meta(description="steps from the peak to end; null for all that are left after warm-up and hold"),
]
LONGEST = 2**31 - 1  # steps of a run, counted in int32


class Span(NamedTuple):
    """The part of a run that a schedule is for."""

    peak: Any
    warmup: int  # steps
    steps: int  # of the whole run

    def left(self, given: int | None = None, hold: int = 0) -> int:
        """The steps of a decay: as given, or all that are left after the warm-up and the steps at the peak."""
        rest = self.steps - self.warmup
        if hold and not given and hold >= rest:
            raise InputError(f"hold_steps must be below {rest}, the steps after the warm-up, not {hold}")
        return given or max(1, rest - hold)


def constant(span: Span) -> optax.Schedule:
    """The peak for good."""
    return optax.constant_schedule(span.peak)


def linear(span: Span, end: End = 0.0, decay_steps: Decay = None) -> optax.Schedule:
    """A straight line from the peak to end."""
    return optax.linear_schedule(span.peak, end * span.peak, span.left(decay_steps))


def cosine(span: Span, end: End = 0.0, exponent: Exponent = 1.0, decay_steps: Decay = None) -> optax.Schedule:
    """Half a cosine from the peak to end."""
    return optax.cosine_decay_schedule(span.peak, span.left(decay_steps), end, exponent)


def polynomial(
    span: Span, power: PositiveFloat = 1.0, end: End = 0.0, hold_steps: Hold = 0, decay_steps: Decay = None
) -> optax.Schedule:
    """end + (1 - end) (1 - t / decay_steps)^power.

    Args:
      power: 1 is a straight line.
    """
    return _polynomial(span.peak, end * span.peak, power, span.left(decay_steps, hold_steps), hold_steps)


def exponential(
    span: Span,
    decay_rate: Inside = 0.1,
    decay_steps: PositiveInt | None = None,
    staircase: bool = False,
    end: End = 0.0,
    hold_steps: Hold = 0,
) -> optax.Schedule:
    """decay_rate^(t / decay_steps), not below end.

    Args:
      decay_rate: what decay_steps steps leave of the rate.
      decay_steps: steps of one factor decay_rate; null for all that are left after warm-up and hold.
      staircase: fall once in decay_steps steps, by the whole factor.
    """
    length = span.left(decay_steps, hold_steps)
    return optax.exponential_decay(span.peak, length, decay_rate, hold_steps, staircase, end_value=end * span.peak)


def piecewise(
    span: Span, points: Mapping[int, Share], between: Literal["constant", "linear", "cosine"] = "constant"
) -> optax.Schedule:
    """Given shares of the peak at given steps.

    Args:
      points: share of the peak by step of the run, warm-up counted, such as {100: 0.5, 200: 0.1}.
      between: constant: jumps; else the way to a point.
    """
    if not points:
        raise InputError("points is empty: give a share of the peak by step, such as {100: 0.5}")
    places = sorted(points)
    for step in places[:-1]:
        if points[step] == 0:
            raise InputError(f"points[{step}] is 0, which only the last may be: give a small share")
    if places[0] <= span.warmup:
        raise InputError(f"points must lie after step {span.warmup}, where the peak is, not at {places[0]}")
    shares = pairwise([1.0, *(points[place] for place in places)])
    scales = {place - span.warmup: new / old for place, (old, new) in zip(places, shares, strict=True)}
    if between == "constant":
        return optax.piecewise_constant_schedule(span.peak, scales)
    return _precise(optax.piecewise_interpolate_schedule(between, span.peak, scales))


def cosine_with_restarts(
    span: Span,
    cycles: Annotated[int, Meta(ge=1, le=10_000)] = 1,
    growth: PositiveFloat = 1.0,
    cycle_peak: NotZero = 1.0,
    cycle_warmup_steps: NonNegativeInt = 0,
    end: End = 0.0,
    exponent: Exponent = 1.0,
    decay_steps: PositiveInt | None = None,
) -> optax.Schedule:
    """Cosines, one after another, each from its peak to end (SGDR, arXiv 1608.03983).

    Args:
      cycles: how many.
      growth: length of a cosine, of the one before.
      cycle_peak: peak of a cosine, of the one before.
      cycle_warmup_steps: first steps of each later cosine that rise linearly from end.
      decay_steps: steps of all of them; null for all that are left after the warm-up.
    """
    total, sizes = span.left(decay_steps), [growth**i for i in range(cycles)]
    ends = [round(total * sum(sizes[:i]) / sum(sizes)) for i in range(cycles + 1)]
    lengths, last = [stop - start for start, stop in pairwise(ends)], cycle_peak ** (cycles - 1)
    if min(lengths) <= cycle_warmup_steps * (cycles > 1):
        raise InputError(f"cycles: {cycles} do not fit into {total} steps: the least has {min(lengths)}")
    if last <= end:
        raise InputError(f"end must be below {last:g}, the last peak, not {end}")
    same: dict[str, Any] = {"init_value": end, "end_value": end, "exponent": exponent}
    each = [
        {**same, "peak_value": cycle_peak**i, "decay_steps": length, "warmup_steps": cycle_warmup_steps * (i > 0)}
        for i, length in enumerate(lengths)
    ]
    shape = optax.sgdr_schedule(each)
    return lambda count: span.peak * shape(count)


def inverse_sqrt(span: Span, timescale: PositiveInt | None = None) -> optax.Schedule:
    """(1 + t / timescale)^-1/2.

    Args:
      timescale: null for the steps of the warm-up, or 10000 where there is none.
    """
    scale = timescale or span.warmup or 10_000
    return lambda count: span.peak * jnp.sqrt(scale / (scale + jnp.maximum(count, 0)))


def wsd(
    span: Span,
    decay: Literal["cosine", "linear", "sqrt"] = "cosine",
    decay_steps: PositiveInt | None = None,
    end: End = 0.0,
) -> optax.Schedule:
    """Warm-up, stable, decay: the peak, and a decay over the last decay_steps.

    Args:
      decay: shape of the decay; sqrt is 1 - (t / decay_steps)^1/2.
      decay_steps: last steps of the run, which go from the peak to end; null for a tenth.
    """
    rest, low = span.left(), end * span.peak
    length = decay_steps or max(1, min(rest, span.steps // 10))
    if length > rest:
        raise InputError(f"decay_steps must be at most {rest}, the steps after the warm-up, not {length}")
    rise = _polynomial(low, span.peak, 0.5, length)
    falls: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(span.peak, length, end),
        "linear": optax.linear_schedule(span.peak, low, length),
        "sqrt": lambda count: rise(length - count),
    }
    return optax.join_schedules([optax.constant_schedule(span.peak), falls[decay]], [rest - length])


def one_cycle(
    span: Span,
    between: Literal["cosine", "linear"] = "cosine",
    rise: Inside = 0.3,
    fall: Inside = 0.85,
    start: NotZero = 0.04,
    end: NotZero = 4e-6,
    cycle_steps: PositiveInt | None = None,
) -> optax.Schedule:
    """From start up to the peak and down to end; the rise is its warm-up (arXiv 1708.07120).

    Args:
      between: cosine: one fall; linear: to start, then to end.
      rise: share of the cycle at which the peak is.
      fall: share of the cycle at which a linear one is back at start.
      start: share of the peak at step 0.
      end: share of the peak after the cycle; not 0.
      cycle_steps: steps of the cycle; null for all steps.
    """
    if end > start:
        raise InputError(f"end must be in (0, start], not {end}, since start is {start}")
    if between == "linear" and fall <= rise:
        raise InputError(f"fall must be above rise, which is {rise}, not {fall}")
    length, turn = cycle_steps or span.steps, [fall] if between == "linear" else []
    places = [0, *(int(share * length) for share in (rise, *turn)), length]
    if any(new <= old for old, new in pairwise(places)):
        keys = "rise and fall" if turn else "rise"
        raise InputError(f"{keys}: a cycle of {length} steps would turn at {places[1:-1]}: give it more")
    if turn:
        return _precise(optax.linear_onecycle_schedule(length, span.peak, rise, fall, 1 / start, start / end))
    return _precise(optax.cosine_onecycle_schedule(length, span.peak, rise, 1 / start, start / end))


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """A schedule: ``name`` and the keys of its function. The classes below derive from it."""

    name: str

    function: ClassVar[Callable[..., optax.Schedule]]

    def __post_init__(self) -> None:
        """Check the keys: their types, and what no run is long enough for."""
        super().__post_init__()
        warmup_of(self, LONGEST)
        type(self).function(Span(1.0, getattr(self, "warmup_steps", 0), LONGEST), **arguments_of(self))


@dataclass(frozen=True)
class Warmup(ScheduleConfig):
    """The warm-up of every schedule but ``one_cycle``."""

    warmup_steps: NonNegativeInt = option(0, "steps of linear rise from warmup_start to the peak")
    warmup_ratio: Share = option(0.0, "the same as a share of all steps, rounded up; instead of warmup_steps")
    warmup_start: Share = option(0.0, "share of the peak at which the warm-up starts")


def _warmed(function: Callable[..., optax.Schedule], *names: str) -> Any:
    return member(function, Warmup, *names, skip=["span"])


Constant = _warmed(constant)
Linear = _warmed(linear)
Cosine = _warmed(cosine)
Polynomial = _warmed(polynomial)
Exponential = _warmed(exponential)
Piecewise = _warmed(piecewise)
Restarts = _warmed(cosine_with_restarts)
InverseSqrt = _warmed(inverse_sqrt)
Wsd = _warmed(wsd, "wsd", "warmup_stable_decay")
OneCycle = member(one_cycle, ScheduleConfig, skip=["span"])


def schedule_of(config: ScheduleConfig, peak: Any, steps: int) -> optax.Schedule:
    """The learning rate by the number of updates so far, float32; counts may be traced, and so may the peak.

    Args:
      config: the shape.
      peak: the highest rate.
      steps: of the whole run.

    Raises:
      InputError: naming a key that does not fit a run of so many steps.
    """
    try:
        warmup = warmup_of(config, steps)
        after = type(config).function(Span(peak, warmup, steps), **arguments_of(config))
    except InputError as error:
        raise InputError(f"schedule.{error}") from None
    if not isinstance(config, Warmup):
        return after
    rise = optax.linear_schedule(config.warmup_start * peak, peak, max(1, warmup))
    return optax.join_schedules([rise, after], [warmup])


def warmup_of(config: ScheduleConfig, steps: int) -> int:
    """The steps of the warm-up in a run of ``steps``; of a ratio, as transformers has it, the next whole number."""
    if not isinstance(config, Warmup):
        return 0
    count, ratio = config.warmup_steps, config.warmup_ratio
    if count and ratio:
        raise InputError(f"give warmup_steps or warmup_ratio, not both ({count}, {ratio})")
    if count > steps:
        raise InputError(f"warmup_steps must be in [0, {steps}], not {count}")
    return count or math.ceil(round(ratio * steps, 6))  # 0.07 * 100 is 7.000000000000001


def _polynomial(start: Any, end: Any, power: float, length: int, begin: int = 0) -> optax.Schedule:
    """``optax.polynomial_schedule``, but of the steps that are left: exactly ``end`` at the end on every backend.

    ``1 - count / length`` can be below zero there, which a power makes NaN, where a compiler multiplies by the inverse.
    """

    def schedule(count: Any) -> jax.Array:
        left = jnp.asarray(length - jnp.clip(count - begin, 0, length), jnp.float32)
        rate: jax.Array = end + (start - end) * (left / length) ** power
        return rate

    return schedule


def _precise(schedule: optax.Schedule) -> optax.Schedule:
    """Optax interpolates by a dot product, which accelerators may round to fewer bits and x64 widens."""

    def precise(count: Any) -> jax.Array:
        with jax.default_matmul_precision("float32"):
            return jnp.asarray(schedule(count), jnp.float32)

    return precise
