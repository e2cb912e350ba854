"""Stable-LoRA: shrink A until the pair is stable (arXiv 2603.05204, section 4; reference ``stable_lora.py``).

Each step, for each pair, with the gradients already taken at the unshrunk (A, B)::

    if shrinking and ||A||_F < (numel(A) / numel(B)) ||B||_F:  shrinking <- False, for ever
    if shrinking:                                              A <- (1 - lambda) A
    A, B <- A + u_A, B + u_B    where u = inner(gradients, the parameters with A as shrunk)

The test, ``||A||_F / in < ||B||_F / out``, sees A and B as they are before this step. Moments of the inner optimizer
are not touched by the shrink, and the shrink ignores learning rate, schedule and clipping.

It is therefore a *wrapper*: it shows the inner optimizer the shrunk parameters, so that weight decay acts on them, and
returns ``(shrunk - old) + u``. A link placed after AdamW in a chain is not the same once weight decay is on. It wraps
last: ``MultiSteps(chain(clip, stable_lora(...)))``. Inside ``MultiSteps`` is right, around it every micro-batch would
shrink; and a ``scale`` that follows it in a chain would scale the shrink.

Norms and the test stand in a ``cond`` that a compiled update skips once every latch is off; A times 1 is then fused
into the inner update.

Differences from the reference: the latch lives in the state, so a resumed run goes on exactly (the reference loses it),
and a ratio outside [0, 1) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax.lora.names import module_names
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.pair_tree import map_pairs
from stablelora_jax.utils.errors import InputError

ON, OFF, PADDING = 1, 0, -1  # values of a latch
Ratio = Any  # float, traced scalar, or a schedule: count -> scalar


class ShrinkUntilStableState(NamedTuple):
    """State of :func:`shrink_until_stable`."""

    shrinking: Any  # latches at the pairs' paths, shape of the stack axes, int8: 1 on, 0 off, -1 padding
    count: jax.Array | None  # type: ignore[assignment]  # updates so far, int32; None unless the ratio is a schedule
    inner: optax.OptState


def shrink_until_stable(
    inner: optax.GradientTransformation, shrink_ratio: Ratio, stop_rule: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Wrap ``inner`` so that each pair's A shrinks by ``shrink_ratio`` a step until the pair is stable.

    Args:
      inner: any transformation; it sees the shrunk A as its parameters.
      shrink_ratio: lambda in [0, 1), a traced scalar, or a schedule of the number of updates. The paper searches
        5e-4, 1e-3, 2e-3, 5e-3; 0 leaves ``inner`` as it is.
      stop_rule: False shrinks A in every step, the paper's ablation.

    Returns:
      A transformation whose ``update`` needs ``params``. Leaves that are in no pair pass through ``inner`` alone.

    Raises:
      InputError: a ratio outside [0, 1), an ``inner`` that is no transformation; in ``init`` and ``update``, no pair,
        half of one, a factor hidden by ``optax.masked`` or ``optax.partition``, or shapes that make no pair.
    """
    require_numbers(shrink_ratio=shrink_ratio)
    if not isinstance(inner, optax.GradientTransformation):
        raise InputError(f"inner must be an optax.GradientTransformation, not {inner!r:.60}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ShrinkUntilStableState:
        count = jnp.zeros((), jnp.int32) if callable(shrink_ratio) else None
        map_pairs(partial(_require_reach, ratio=shrink_ratio), params)
        return ShrinkUntilStableState(map_pairs(_first_latch, params), count, inner.init(params))

    def update(
        updates: Any, state: ShrinkUntilStableState, params: Any = None, **extra: Any
    ) -> tuple[Any, ShrinkUntilStableState]:
        ratio = shrink_ratio(state.count) if callable(shrink_ratio) else shrink_ratio

        def look(latches: Any) -> tuple[Any, Any]:
            latches = map_pairs(_next_latch, params, latches) if stop_rule else latches
            return latches, map_pairs(partial(kept_share, ratio=ratio), params, latches)

        def rest(latches: Any) -> tuple[Any, Any]:
            return latches, map_pairs(partial(kept_share, ratio=0), params, latches)

        any_on = jnp.array([(latch == ON).any() for latch in jax.tree.leaves(state.shrinking)]).any()
        shrinking, kept = jax.lax.cond(any_on, look, rest, state.shrinking)
        shrunk = map_pairs(shrink, params, kept, other=lambda leaf, _: leaf)
        updates, inner_state = inner.update(updates, state.inner, shrunk, **extra)
        updates = map_pairs(_add_shrink, params, shrunk, updates, other=lambda *leaves: leaves[-1])
        count = None if state.count is None else optax.safe_increment(state.count)
        return updates, ShrinkUntilStableState(shrinking, count, inner_state)

    return of_pairs(optax.GradientTransformationExtraArgs(init, update))


def stable_lora(
    learning_rate: optax.ScalarOrSchedule,
    shrink_ratio: Ratio = 5e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    stop_rule: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Stable-LoRA with AdamW, the optimizer of the paper.

    ``shrink_until_stable(optax.adamw(learning_rate, ...), shrink_ratio)`` and nothing else.

    Args:
      learning_rate: scalar or optax schedule.
      shrink_ratio: lambda, the share of A that a step removes until the pair is stable; 0 is AdamW.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule; acts on A as shrunk.
      stop_rule: False shrinks A in every step, the paper's ablation.
    """
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    inner = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return shrink_until_stable(inner, shrink_ratio, stop_rule)


def still_shrinking(opt_state: Any, stacked: Sequence[str] = ("layers",)) -> dict[str, bool]:
    """The latches of Stable-LoRA by dotted module path, one for each layer of a stack; padding is left out.

    Args:
      opt_state: any optimizer state that holds one of :func:`shrink_until_stable`, however deep; of a state that
        ``pmap`` has replicated, one copy.
      stacked: the spec's ``stacked``: which path components the layer's number follows.

    Raises:
      InputError: ``opt_state`` holds no such state.
    """
    found = latches(opt_state)
    if not found:
        raise InputError("this optimizer state holds no latches: no shrink_until_stable has made it")
    named: dict[str, bool] = {}
    for path, latch in jax.tree.leaves_with_path([state.shrinking for state in found]):
        keys = tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path[1:])
        values = np.asarray(latch)
        pairs = zip(module_names(keys, values.shape, stacked), values.reshape(-1), strict=True)
        named |= {name: bool(value) for name, value in pairs if value != PADDING}
    return named


def latches(opt_state: Any) -> list[ShrinkUntilStableState]:
    """Every Stable-LoRA state inside ``opt_state``, without the inner optimizer's: small enough to log each step."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ShrinkUntilStableState))
    return [n._replace(inner=()) for n in nodes if isinstance(n, ShrinkUntilStableState)]


def _first_latch(pair: Mapping[str, jax.Array]) -> jax.Array:
    a, b = pair["lora_a"], pair["lora_b"]
    if a.ndim == 2:
        return jnp.full((), ON, jnp.int8)
    real = (a != 0).any(axis=(-2, -1)) | (b != 0).any(axis=(-2, -1))
    return jnp.where(real, ON, PADDING).astype(jnp.int8)


def _require_reach(pair: Mapping[str, jax.Array], ratio: Ratio) -> None:
    dtype = pair["lora_a"].dtype
    if isinstance(ratio, float | np.floating) and ratio > 0 and np.asarray(1 - ratio, dtype) == 1:
        raise InputError(f"in {dtype} a shrink by {ratio} changes nothing: adapters are float32 or wider")


def _next_latch(pair: Mapping[str, jax.Array], latch: jax.Array) -> jax.Array:
    a, b = pair["lora_a"], pair["lora_b"]
    norm_a, norm_b = (jnp.linalg.norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=(-2, -1)) for x in (a, b))
    stable = norm_a < (a.shape[-2] / b.shape[-1]) * norm_b  # numel(A) / numel(B) = in / out
    return jnp.where((latch == ON) & stable, OFF, latch).astype(latch.dtype)


def kept_share(pair: Mapping[str, jax.Array], latch: jax.Array, ratio: Ratio) -> jax.Array:
    """What a step leaves of A: 1 - lambda where the latch is on, else 1; shape of the stack axes, dtype of A."""
    dtype = pair["lora_a"].dtype
    share = jnp.asarray(1 - ratio, dtype) if isinstance(ratio, int | float) else 1 - jnp.asarray(ratio, dtype)
    return jnp.where(latch == ON, share, jnp.ones((), dtype))


def shrink(pair: Any, kept: jax.Array) -> Any:
    """``pair`` with A times ``kept``, as :func:`kept_share` gives it."""
    return type(pair)({**pair, "lora_a": kept[..., None, None] * pair["lora_a"]})


def _add_shrink(pair: Any, shrunk: Any, step: Any) -> Any:
    # u - (old - shrunk) is (shrunk - old) + u to the last bit, and u itself, a zero's sign too, where nothing shrinks.
    return type(step)({**step, "lora_a": step["lora_a"] - (pair["lora_a"] - shrunk["lora_a"])})
