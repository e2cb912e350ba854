"""LoRA-Pre: Adam whose moments are kept at low rank (Wang et al., ICLR 2026, arXiv 2602.24283). ::

    mB' = (1 - g1) mB + g1 g mA^T (mA mA^T)^-1,    mA' = (1 - g1) mA + g1 (mB^T mB)^-1 mB^T g,   1 - g1 = b1^(1/2)
    vB', vA' likewise from |g|,                                                                1 - g2 = b2^(1/4)
    m = b1 mB' mA' + (1 - b1) g,    v = b2 (vB' vA')^2 + (1 - b2) g^2
    p <- p - eta (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + w p)

An exponential average is a gradient step on ``|m - g|^2 / 2``; the factors take Newton steps on it instead. It acts on
each factor of a pair as a tall matrix g (p, r) with moment factors of a lower rank k: 2 k (p + r) numbers instead of
2 p r. Start (unpublished, ours): mA = 0 and mB random along the long side, fixed by the seed and the shape, as LoRA
itself starts; an average of nothing is then zero and the bias correction is Adam's. Inverses are pseudo-inverses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, over, pairwise
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers, require_whole
from stablelora_jax.optimizers.linalg import inverses, times, transpose
from stablelora_jax.optimizers.pair_tree import others_by_adamw
from stablelora_jax.utils.errors import InputError


class Moment(NamedTuple):
    """A moment of a tall matrix (..., p, r) as two factors of rank k."""

    b: jax.Array  # (..., p, k)
    a: jax.Array  # (..., k, r)


class Moments(NamedTuple):
    """The moments of both factors of a pair."""

    a: Moment
    b: Moment


class LoraPreState(NamedTuple):
    """State of a pair."""

    mu: Moments
    nu: Moments


def lora_pre(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 2,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with low-rank moments; leaves outside pairs get AdamW.

    Args:
      learning_rate: scalar or schedule.
      rank: k of the moments, at least 1 and at most the rank of the pairs; static.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule.
      seed: of the random start; static.

    Raises:
      InputError: a number out of range; in ``init``, a pair of lower rank than the moments.
    """
    require_whole(1, rank=rank)
    require_whole(-(2**63), seed=seed)
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)

    def first_state(pair: Pair) -> LoraPreState:
        if min(pair.a.shape[-2:] + pair.b.shape[-2:]) < rank:
            sizes = f"in {pair.a.shape[-2]}, out {pair.b.shape[-2]} and rank {pair.a.shape[-1]}"
            raise InputError(f"moments of rank {rank} do not fit {sizes}: give lora_pre a lower rank")
        first, second = jax.random.split(jax.random.key(seed))
        return LoraPreState(
            Moments(*(_start(first, x, rank) for x in pair)),
            Moments(*(jax.tree.map(jnp.abs, _start(second, x, rank)) for x in pair)),
        )

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, LoraPreState]]:
        del extra
        t, grads = count + 1, [x for g in groups for x in g.grads]
        mu = _newton([m for g in groups for m in g.state.mu], grads, 1 - b1**0.5)
        nu = _newton([v for g in groups for v in g.state.nu], [jnp.abs(x) for x in grads], 1 - b2**0.25)
        steps = []
        for x, m, v in zip(grads, mu, nu, strict=True):
            first = b1 * m.b @ m.a + (1 - b1) * x
            second = b2 * (v.b @ v.a) ** 2 + (1 - b2) * x**2
            steps.append(over(first / (1 - b1**t), jnp.sqrt(second / (1 - b2**t)) + eps))
        return [
            (Pair(*steps[i : i + 2]), LoraPreState(Moments(*mu[i : i + 2]), Moments(*nu[i : i + 2])))
            for i in range(0, len(steps), 2)
        ]

    adam = optax.chain(
        pairwise(first_state, update),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return of_pairs(others_by_adamw(adam, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))


def _start(key: jax.Array, x: jax.Array, rank: int) -> Moment:
    *stack, p, r = x.shape
    random = jax.random.normal(key, (p, rank), x.dtype)
    return Moment(jnp.broadcast_to(random, (*stack, p, rank)), jnp.zeros((*stack, rank, r), x.dtype))


def _newton(moments: Sequence[Moment], targets: Sequence[jax.Array], rate: Any) -> list[Moment]:
    """One step of both factors towards the targets, each from the other's old value."""
    by_a = inverses([transpose(m.a) for m in moments])
    by_b = inverses([m.b for m in moments])
    return [
        Moment(
            (1 - rate) * m.b + times(rate * g @ transpose(m.a), for_a),
            (1 - rate) * m.a + rate * transpose(times(transpose(g) @ m.b, for_b)),
        )
        for m, g, for_a, for_b in zip(moments, targets, by_a, by_b, strict=True)
    ]
