"""LoFT: AdamW of the kernel, seen through one factor a step (Tastan and others, ICLR 2026, arXiv 2505.21289).

With A, B tall, s the LoRA scale and ``(.)_i`` a row, in every step for A (for B likewise)::

    h = gA (B^T B + lam I)^-1 / s^2            s h B^T is G projected on the span of B
    C = Bo^T B (B^T B + lam I)^-1              Bo the B of the step before
    M <- b1 M C + (1 - b1) h
    P_i <- b2 C^T P_i C + (1 - b2) h_i h_i^T   (in, r, r)

and then for the factor whose turn it is, B first, since it starts at zero::

    D_ij = s M_i B_j / (1 - b1^t) / (sqrt(s^2 B_j^T P_i B_j / (1 - b2^t)) + eps)       AdamW's direction, (in, out)
    A <- A - eta (D B (B^T B + lam I)^-1 / s + w A)

With lam = 0 the trajectory of A B^T is the same for every factorisation, and if also r = in = out, the kernel moves as
AdamW would move it. P takes r^2 (in + out) numbers, D for a moment in times out.

Differences: the paper has no s; the rule is that of the pair sqrt(s) A, sqrt(s) B. eps and lam > 0 are the released
code's. That code (tnurbek/loft) has C P_i C^T in the second moments, which is not AdamW's even at full rank; it shows
B's moments the A that has just moved, with the gradient of the old one; and it decays by w, not eta w. The paper's
clipping, by the norm of s h B^T, is left out: a clip in a chain sees the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, over, pairwise, settled, value
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.linalg import Inverse, inverses, times, transpose
from stablelora_jax.optimizers.pair_tree import Scale, others_by_adamw


class LoftState(NamedTuple):
    """State of a pair, tall."""

    mu: Pair  # first moments
    nu: Pair  # second moments of each row: .a (..., n, r, r), .b (..., m, r, r)
    before: Pair  # the factors in the step before


class Options(NamedTuple):
    """Numbers of the rule; see :func:`loft`."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    lam: Any


def loft(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    lam: float = 1e-6,
    scale: Scale = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """LoFT; leaves outside pairs get AdamW.

    Args:
      learning_rate: scalar or schedule, of the number of steps of both factors together.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the kernel's second moment.
      weight_decay: decoupled, scalar or schedule; acts on the factor whose step it is.
      lam: added to the Gram matrices' diagonals.
      scale: the LoRA scale s: ``scales(adapters, spec)``; 1.0 only where alpha equals the rank.

    Raises:
      InputError: a number out of range, or a scale that is missing for a pair.
    """
    require_numbers(lam=lam, learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    o = Options(learning_rate, b1, b2, eps, weight_decay, lam)

    def start(pair: Pair) -> LoftState:
        squares = [jnp.zeros((*x.shape, x.shape[-1]), x.dtype) for x in pair]
        zeros = jax.tree.map(jnp.zeros_like, pair)
        return LoftState(zeros, Pair(*squares), zeros)

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, LoftState]]:
        del extra
        found = inverses([x for g in groups for x in (g.params.b, g.params.a)], lam)
        by = [{"a": of_b, "b": of_a} for of_b, of_a in zip(found[::2], found[1::2], strict=True)]
        states = [_moments(g, inverse, o) for g, inverse in zip(groups, by, strict=True)]
        moved = settled([(g.params, state) for g, state in zip(groups, states, strict=True)], groups)
        nexts = [g._replace(state=state) for g, (_, state) in zip(groups, moved, strict=True)]

        def turn(name: str) -> Any:
            return lambda: [_step(g, inverse, count, o, name) for g, inverse in zip(nexts, by, strict=True)]

        steps = jax.lax.cond(count % 2 == 0, turn("b"), turn("a"))
        return [(step, g.state) for step, g in zip(steps, nexts, strict=True)]

    return of_pairs(
        others_by_adamw(pairwise(start, update, scale), learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    )


def _moments(g: Group, by: Mapping[str, Inverse], o: Options) -> LoftState:
    """Both moments of both factors after this step's gradients."""
    mu, nu = {}, {}
    for name, other in (("a", "b"), ("b", "a")):
        inverse, partner, old = by[name], getattr(g.params, other), getattr(g.state.before, other)
        carry = transpose(old / inverse.scale) @ (partner / inverse.scale) @ inverse.matrix
        h = times(getattr(g.grads, name), inverse) / g.scale[:, None, None] ** 2
        mu[name] = o.b1 * getattr(g.state.mu, name) @ carry + (1 - o.b1) * h
        carried = transpose(carry)[:, None] @ getattr(g.state.nu, name) @ carry[:, None]
        nu[name] = o.b2 * carried + (1 - o.b2) * h[..., :, None] * h[..., None, :]
    return LoftState(Pair(**mu), Pair(**nu), g.params)


def _step(g: Group, by: Mapping[str, Inverse], count: jax.Array, o: Options, name: str) -> Pair:
    """The step of factor ``name``; the other one stays."""
    inverse, s, t = by[name], g.scale[:, None, None], count + 1
    p, mu, nu = (getattr(x, name) for x in (g.params, g.state.mu, g.state.nu))
    partner = s * getattr(g.params, "b" if name == "a" else "a")
    square = jnp.einsum("pir,pjr->pij", nu.reshape(*nu.shape[:2], -1), _outer(partner))
    square = jnp.where(jnp.isnan(square), jnp.inf, jnp.maximum(square, 0))  # infinite moments of both signs
    root = jnp.sqrt(square / (1 - o.b2**t)) + o.eps
    direction = over(mu @ transpose(partner) / (1 - o.b1**t), root)
    step = times(direction @ partner, inverse) / s**2 + value(o.weight_decay, count) * p
    moved = (-value(o.learning_rate, count) * step).astype(p.dtype)
    still = Pair(*(jnp.zeros_like(x) for x in g.params))
    return still._replace(**{name: moved})


def _outer(x: jax.Array) -> jax.Array:
    """``x_j x_j^T`` of each row, flat: (P, m, r) to (P, m, r r)."""
    return (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:2], -1)
