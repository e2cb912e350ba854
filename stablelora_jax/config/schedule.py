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
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.config.keys import REQUIRED, option
from stablelora_jax.utils.errors import InputError

SHARE, POSITIVE = (lambda x: 0 <= x <= 1, "in [0, 1]"), (lambda x: 0 < x < math.inf, "positive")
COUNT, LENGTH = (lambda x: x >= 0, "at least 0"), (lambda x: x >= 1, "at least 1")
BETWEEN, ABOVE = (lambda x: 0 < x < 1, "in (0, 1)"), (lambda x: 0 < x <= 1, "in (0, 1]")
LIMITS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("warmup_ratio", "warmup_start", "end"), SHARE),
    **dict.fromkeys(("warmup_steps", "hold_steps", "cycle_warmup_steps"), COUNT),
    **dict.fromkeys(("decay_steps", "cycles", "cycle_steps", "timescale"), LENGTH),
    **dict.fromkeys(("exponent", "power", "growth"), POSITIVE),
    **dict.fromkeys(("decay_rate", "rise", "fall"), BETWEEN),
    **dict.fromkeys(("start", "cycle_peak"), ABOVE),
}
REST = "null for all that are left after the warm-up"


@dataclass(frozen=True)
class Warmup:
    """The warm-up of every schedule but ``one_cycle``."""

    name: str
    warmup_steps: int = option(0, "steps of linear rise from warmup_start to the peak")
    warmup_ratio: float = option(0.0, "the same as a share of all steps, rounded up; instead of warmup_steps")
    warmup_start: float = option(0.0, "share of the peak at which the warm-up starts")

    def __post_init__(self) -> None:
        """Check every key by itself."""
        _check(self)
        if self.warmup_steps and self.warmup_ratio:
            raise InputError(f"give warmup_steps or warmup_ratio, not both ({self.warmup_steps}, {self.warmup_ratio})")


@dataclass(frozen=True)
class Constant(Warmup):
    """Constant at the peak."""

    name: Literal["constant"] = option("constant", "the peak for good")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        del warmup, steps
        return optax.constant_schedule(peak)


@dataclass(frozen=True)
class Linear(Warmup):
    """Linear decay."""

    name: Literal["linear"] = option("linear", "a straight line from the peak to end")
    end: float = option(0.0, "share of the peak that it comes down to")
    decay_steps: int | None = option(None, f"steps from the peak to end; {REST}")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        return optax.linear_schedule(peak, self.end * peak, self.decay_steps or _left(warmup, steps))


@dataclass(frozen=True)
class Cosine(Warmup):
    """Cosine decay."""

    name: Literal["cosine"] = option("cosine", "half a cosine from the peak to end")
    end: float = option(0.0, "share of the peak that it comes down to")
    exponent: float = option(1.0, "power of the cosine's part, before end is added")
    decay_steps: int | None = option(None, f"steps from the peak to end; {REST}")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        length = self.decay_steps or _left(warmup, steps)
        return optax.cosine_decay_schedule(peak, length, alpha=self.end, exponent=self.exponent)


@dataclass(frozen=True)
class Polynomial(Warmup):
    """Polynomial decay."""

    name: Literal["polynomial"] = option("polynomial", "end + (1 - end) (1 - t / decay_steps)^power")
    power: float = option(1.0, "1 is a straight line")
    end: float = option(0.0, "share of the peak that it comes down to")
    hold_steps: int = option(0, "steps at the peak before")
    decay_steps: int | None = option(None, f"steps from the peak to end; {REST} and hold_steps")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        length = self.decay_steps or _left(warmup + _held(self.hold_steps, warmup, steps), steps)
        return _polynomial(peak, self.end * peak, self.power, length, self.hold_steps)


@dataclass(frozen=True)
class Exponential(Warmup):
    """Exponential decay, continuous or stepwise."""

    name: Literal["exponential"] = option("exponential", "decay_rate^(t / decay_steps), not below end")
    decay_rate: float = option(0.1, "what decay_steps steps leave of the rate")
    decay_steps: int | None = option(None, f"steps of one factor decay_rate; {REST} and hold_steps")
    staircase: bool = option(False, "fall once in decay_steps steps, by the whole factor")
    end: float = option(0.0, "share of the peak below which it does not fall")
    hold_steps: int = option(0, "steps at the peak before")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        length = self.decay_steps or _left(warmup + _held(self.hold_steps, warmup, steps), steps)
        return optax.exponential_decay(
            peak, length, self.decay_rate, self.hold_steps, self.staircase, end_value=self.end * peak
        )


@dataclass(frozen=True, kw_only=True)
class Piecewise(Warmup):
    """Piecewise: given fractions of the peak at given steps."""

    name: Literal["piecewise"] = option("piecewise", "given shares of the peak at given steps")
    points: Mapping[int, float] = option(
        REQUIRED, "share of the peak by step of the run, warm-up counted, such as {100: 0.5, 200: 0.1}"
    )
    between: Literal["constant", "linear", "cosine"] = option("constant", "constant: jumps; else the way to a point")

    def __post_init__(self) -> None:
        """Check the points, too."""
        super().__post_init__()
        if not self.points:
            raise InputError("points is empty: give a share of the peak by step, such as {100: 0.5}")
        for step, share in self.points.items():
            if not 0 <= share <= 1:
                raise InputError(f"points[{step}] must be in [0, 1], a share of the peak, not {share}")
            if share == 0 and step != max(self.points):
                raise InputError(f"points[{step}] is 0, which only the last may be: give a small share")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        places = sorted(self.points)
        if places[0] <= warmup:
            raise InputError(f"schedule.points must lie after step {warmup}, where the peak is, not at {places[0]}")
        shares = [1.0, *(self.points[place] for place in places)]
        factors = [new / old for old, new in pairwise(shares)]
        scales = {place - warmup: factor for place, factor in zip(places, factors, strict=True)}
        if self.between == "constant":
            return optax.piecewise_constant_schedule(peak, scales)
        return _precise(optax.piecewise_interpolate_schedule(self.between, peak, scales))


@dataclass(frozen=True)
class Restarts(Warmup):
    """Cosines, one after another (SGDR, arXiv 1608.03983)."""

    name: Literal["cosine_with_restarts"] = option("cosine_with_restarts", "cosines, each from its peak to end")
    cycles: int = option(1, "how many")
    growth: float = option(1.0, "length of a cosine, of the one before")
    cycle_peak: float = option(1.0, "peak of a cosine, of the one before")
    cycle_warmup_steps: int = option(0, "first steps of each later cosine that rise linearly from end")
    end: float = option(0.0, "share of the first peak that each comes down to")
    exponent: float = option(1.0, "power of the cosine's part, before end is added")
    decay_steps: int | None = option(None, f"steps of all of them; {REST}")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        total, peaks = self.decay_steps or _left(warmup, steps), [self.cycle_peak**i for i in range(self.cycles)]
        sizes = [self.growth**i for i in range(self.cycles)]
        ends = [round(total * sum(sizes[:i]) / sum(sizes)) for i in range(self.cycles + 1)]
        lengths = [stop - start for start, stop in pairwise(ends)]
        if min(lengths) <= self.cycle_warmup_steps * (self.cycles > 1):
            raise InputError(
                f"schedule.cycles: {self.cycles} do not fit into {total} steps: the least has {min(lengths)}"
            )
        if peaks[-1] <= self.end:
            raise InputError(f"schedule.end must be below {peaks[-1]:g}, the last peak, not {self.end}")
        cosines: list[dict[str, Any]] = [
            dict(
                peak_value=top, decay_steps=length, init_value=self.end, warmup_steps=bool(i) * self.cycle_warmup_steps
            )
            for i, (top, length) in enumerate(zip(peaks, lengths, strict=True))
        ]
        shape = optax.sgdr_schedule([{**c, "end_value": self.end, "exponent": self.exponent} for c in cosines])
        return lambda count: peak * shape(count)


@dataclass(frozen=True)
class InverseSqrt(Warmup):
    """The inverse square root of the step."""

    name: Literal["inverse_sqrt"] = option("inverse_sqrt", "(1 + t / timescale)^-1/2")
    timescale: int | None = option(None, "null for the steps of the warm-up, or 10000 where there is none")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        del steps
        scale = self.timescale or warmup or 10_000
        return lambda count: peak * jnp.sqrt(scale / (scale + jnp.maximum(count, 0)))


@dataclass(frozen=True)
class Wsd(Warmup):
    """Warm-up, stable, decay."""

    name: Literal["wsd", "warmup_stable_decay"] = option("wsd", "the peak, and a decay over the last decay_steps")
    decay: Literal["cosine", "linear", "sqrt"] = option(
        "cosine", "shape of the decay; sqrt is 1 - (t / decay_steps)^1/2"
    )
    decay_steps: int | None = option(None, "last steps of the run, which go from the peak to end; null for a tenth")
    end: float = option(0.0, "share of the peak that it comes down to")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        rest = _left(warmup, steps)
        length = self.decay_steps or max(1, min(rest, steps // 10))
        if length > rest:
            raise InputError(f"schedule.decay_steps must be at most {rest}, the steps after the warm-up, not {length}")
        low = self.end * peak
        if self.decay == "cosine":
            decay = optax.cosine_decay_schedule(peak, length, alpha=self.end)
        elif self.decay == "linear":
            decay = optax.linear_schedule(peak, low, length)
        else:  # a rise by the square root, run backwards
            rise = _polynomial(low, peak, 0.5, length)
            decay = _backwards(rise, length)
        return optax.join_schedules([optax.constant_schedule(peak), decay], [rest - length])


@dataclass(frozen=True)
class OneCycle:
    """One cycle: up and down once; the rise is its warm-up (arXiv 1708.07120)."""

    name: Literal["one_cycle"] = option("one_cycle", "from start up to the peak and down to end")
    between: Literal["cosine", "linear"] = option("cosine", "cosine: one fall; linear: to start, then to end")
    rise: float = option(0.3, "share of the cycle at which the peak is")
    fall: float = option(0.85, "share of the cycle at which a linear one is back at start")
    start: float = option(0.04, "share of the peak at step 0")
    end: float = option(4e-6, "share of the peak after the cycle; not 0")
    cycle_steps: int | None = option(None, "steps of the cycle; null for all steps")

    def __post_init__(self) -> None:
        """Check every key by itself."""
        _check(self)
        if not 0 < self.end <= self.start:
            raise InputError(f"end must be in (0, start], not {self.end}, since start is {self.start}")

    def _after(self, peak: Any, warmup: int, steps: int) -> optax.Schedule:
        del warmup
        length, linear = self.cycle_steps or steps, self.between == "linear"
        places = [0, int(self.rise * length), *([int(self.fall * length)] if linear else []), length]
        if any(new <= old for old, new in pairwise(places)):
            keys = "rise and fall" if linear else "rise"
            raise InputError(f"schedule.{keys}: a cycle of {length} steps would turn at {places[1:-1]}: give it more")
        start, down = 1 / self.start, self.start / self.end
        if linear:
            return _precise(optax.linear_onecycle_schedule(length, peak, self.rise, self.fall, start, down))
        return _precise(optax.cosine_onecycle_schedule(length, peak, self.rise, start, down))


ScheduleConfig = (
    Constant | Linear | Cosine | Polynomial | Exponential | Piecewise | Restarts | InverseSqrt | Wsd | OneCycle
)


def schedule_of(config: ScheduleConfig, peak: Any, steps: int) -> optax.Schedule:
    """The learning rate by the number of updates so far, float32; counts may be traced, and so may the peak.

    Args:
      config: the shape.
      peak: the highest rate.
      steps: of the whole run.

    Raises:
      InputError: naming a key that does not fit a run of so many steps.
    """
    warmup = warmup_of(config, steps)
    after = config._after(peak, warmup, steps)
    if isinstance(config, OneCycle):
        return after
    rise = optax.linear_schedule(config.warmup_start * peak, peak, max(1, warmup))
    return optax.join_schedules([rise, after], [warmup])


def warmup_of(config: ScheduleConfig, steps: int) -> int:
    """The steps of the warm-up in a run of ``steps``; of a ratio, as transformers has it, the next whole number."""
    if isinstance(config, OneCycle):
        return 0
    if config.warmup_steps > steps:
        raise InputError(f"schedule.warmup_steps must be in [0, {steps}], not {config.warmup_steps}")
    return config.warmup_steps or math.ceil(round(config.warmup_ratio * steps, 6))  # 0.07 * 100 is 7.000000000000001


def _left(done: int, steps: int) -> int:
    return max(1, steps - done)


def _polynomial(start: Any, end: Any, power: float, length: int, begin: int = 0) -> optax.Schedule:
    """``optax.polynomial_schedule``, but of the steps that are left: exactly ``end`` at the end on every backend.

    ``1 - count / length`` can be below zero there, which a power makes NaN, where a compiler multiplies by the inverse.
    """

    def schedule(count: Any) -> jax.Array:
        left = jnp.asarray(length - jnp.clip(count - begin, 0, length), jnp.float32)
        rate: jax.Array = end + (start - end) * (left / length) ** power
        return rate

    return schedule


def _backwards(schedule: optax.Schedule, length: int) -> optax.Schedule:
    return lambda count: schedule(length - count)


def _held(hold: int, warmup: int, steps: int) -> int:
    if hold and hold >= steps - warmup:
        raise InputError(f"schedule.hold_steps must be below {steps - warmup}, the steps after the warm-up, not {hold}")
    return hold


def _check(config: Any) -> None:
    for key in (f.name for f in fields(config)):
        value, (holds, text) = getattr(config, key), LIMITS.get(key, (None, ""))
        if holds and value is not None and not holds(value):
            raise InputError(f"{key} must be {text}, not {value}")


def _precise(schedule: optax.Schedule) -> optax.Schedule:
    """Optax interpolates by a dot product, which accelerators may round to fewer bits and x64 widens."""

    def precise(count: Any) -> jax.Array:
        with jax.default_matmul_precision("float32"):
            return jnp.asarray(schedule(count), jnp.float32)

    return precise
