"""AltLoRA and AltLoRA+: one factor a step, nearest to the gradient (arXiv 2505.12455, NeurIPS 2025, Algorithms 1, 2).

The step of A, with B as it stands and as it was at A's last step (B's step likewise, s the LoRA scale)::

    h = gA (B^T B + lam I)^-1 / s^2              s h B^T is G projected on the span of B
    M = b1 M B_old^T B (B^T B + lam I)^-1 + (1 - b1) h       the old momentum, re-expressed in the new basis
    A <- A - eta (M + w A)

AltLoRA+ divides M by ``sqrt(V) + eps``, ``V <- b2 V + (1 - b2) h^2`` elementwise, not transported. Neither corrects the
bias. With lam = 0 AltLoRA's trajectory is the same for every factorisation; AltLoRA+'s is not. The paper takes A first
(``first="a"``), where B = 0 makes the first step empty; its ablation finds B first better.

``variant="code"`` is the released run: it does not alternate (A, then B with the new A's Gram matrix but the old
gradient), leaves s out, corrects M's bias, decays after the step, and AltLoRA+ forgets the transport from step to step.
(Its learning rate ignores every schedule; ours does not.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, over, pairwise, settled, value
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.linalg import Inverse, inverses, times, transpose
from stablelora_jax.optimizers.pair_tree import Scale, others_by_adamw
from stablelora_jax.utils.errors import InputError


class AltLoraState(NamedTuple):
    """State of a pair, tall; ``.a`` belongs to A."""

    mu: Pair  # first moments
    nu: Pair | None  # second moments of AltLoRA+
    partner: Pair  # the other factor at the last step of this one: .a (..., m, r) is a B, .b (..., n, r) an A


class Factor(NamedTuple):
    """One factor's part in a step, over a batch of pairs."""

    p: jax.Array
    grad: jax.Array
    mu: jax.Array
    nu: jax.Array | None
    partner: jax.Array  # at this factor's last step


class Options(NamedTuple):
    """Numbers of the rule; see :func:`altlora`."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    lam: Any
    code: bool


def altlora(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    lam: float = 1e-6,
    first: Literal["a", "b"] = "a",
    variant: Literal["paper", "code"] = "paper",
    scale: Scale = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA; leaves outside pairs get AdamW with b2 = 0.999 and eps = 1e-8.

    Args:
      learning_rate: scalar or schedule, of the number of steps of both factors together.
      b1: decay of the momentum.
      weight_decay: decoupled, scalar or schedule; acts on the factor whose step it is.
      lam: added to the Gram matrices' diagonals.
      first: the factor of the first step.
      variant: the paper's rule or that of the released run.
      scale: the LoRA scale s: ``scales(adapters, spec)``; 1.0 only where alpha equals the rank. The code's variant
        ignores it.

    Raises:
      InputError: a number out of range, an unknown variant or factor, or a scale that is missing for a pair.
    """
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, lam=lam)
    options = Options(learning_rate, b1, None, None, weight_decay, lam, variant == "code")
    pairs = _alternate(options, first, variant, scale)
    return of_pairs(others_by_adamw(pairs, learning_rate, b1=b1, weight_decay=weight_decay))


def altlora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    lam: float = 1e-6,
    first: Literal["a", "b"] = "a",
    variant: Literal["paper", "code"] = "paper",
    scale: Scale = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """AltLoRA with Adam's second moment; leaves outside pairs get AdamW.

    Args:
      learning_rate: scalar or schedule, of the number of steps of both factors together.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule; acts on the factor whose step it is.
      lam: added to the Gram matrices' diagonals.
      first: the factor of the first step.
      variant: the paper's rule or that of the released run.
      scale: the LoRA scale s: ``scales(adapters, spec)``; 1.0 only where alpha equals the rank. The code's variant
        ignores it.

    Raises:
      InputError: as :func:`altlora`.
    """
    require_numbers(lam=lam, learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    options = Options(learning_rate, b1, b2, eps, weight_decay, lam, variant == "code")
    pairs = _alternate(options, first, variant, scale)
    return of_pairs(others_by_adamw(pairs, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))


def _alternate(o: Options, first: str, variant: str, scale: Scale) -> optax.GradientTransformationExtraArgs:
    if first not in ("a", "b"):
        raise InputError(f"first must be a or b, not {first!r}")
    if variant not in ("paper", "code"):
        raise InputError(f"variant must be paper or code, not {variant!r}")

    def start(pair: Pair) -> AltLoraState:
        zeros = jax.tree.map(jnp.zeros_like, pair)
        return AltLoraState(zeros, None if o.b2 is None else zeros, Pair(zeros.b, zeros.a))

    def one(name: str) -> Any:
        def step(groups: Sequence[Group], count: jax.Array) -> list[tuple[Pair, AltLoraState]]:
            return settled(_one(groups, count, o, name), groups)

        return step

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, AltLoraState]]:
        del extra
        if o.code:
            moved = _one(groups, count, o, "a")
            nexts = [
                g._replace(state=state, params=g.params._replace(a=g.params.a + step.a))
                for g, (step, state) in zip(groups, moved, strict=True)
            ]
            return [
                (step._replace(b=after.b), state)
                for (step, _), (after, state) in zip(moved, _one(nexts, count, o, "b"), strict=True)
            ]
        a_is_due = (count % 2 == 0) == (first == "a")
        found: list[tuple[Pair, AltLoraState]] = jax.lax.cond(a_is_due, one("a"), one("b"), list(groups), count)
        return found

    return pairwise(start, update, 1.0 if o.code else scale)


def _one(groups: Sequence[Group], count: jax.Array, o: Options, name: str) -> list[tuple[Pair, AltLoraState]]:
    """The step of factor ``name``; the other one stays."""
    other = "b" if name == "a" else "a"
    partners = [getattr(g.params, other) for g in groups]
    results = []
    for g, partner, inverse in zip(groups, partners, inverses(partners, o.lam), strict=True):
        p, grad, mu, partner_then = (getattr(x, name) for x in (g.params, g.grads, g.state.mu, g.state.partner))
        old = Factor(p, grad, mu, None if g.state.nu is None else getattr(g.state.nu, name), partner_then)
        step, mu, nu = _step(old, partner, inverse, g.scale[:, None, None], count, o)
        state = AltLoraState(
            g.state.mu._replace(**{name: mu}),
            None if g.state.nu is None else g.state.nu._replace(**{name: nu}),
            g.state.partner._replace(**{name: partner}),
        )
        results.append((jax.tree.map(jnp.zeros_like, g.params)._replace(**{name: step}), state))
    return results


def _step(
    f: Factor, partner: jax.Array, inverse: Inverse, scale: jax.Array, count: jax.Array, o: Options
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The change of a factor, its momentum and its second moment."""
    rate, decay = value(o.learning_rate, count), value(o.weight_decay, count)
    h = times(f.grad, inverse) / scale**2
    carried = f.mu @ (transpose(f.partner / inverse.scale) @ (partner / inverse.scale)) @ inverse.matrix
    mu = o.b1 * carried + (1 - o.b1) * h
    kept = o.b1 * f.mu + (1 - o.b1) * h if o.code and f.nu is not None else mu
    direction, nu = mu / (1 - o.b1 ** (count + 1)) if o.code else mu, None
    if f.nu is not None:
        nu = o.b2 * f.nu + (1 - o.b2) * h**2
        direction = over(direction, jnp.sqrt(nu) + o.eps)
    if o.code:
        return (1 - rate * decay) * (f.p - rate * direction) - f.p, kept, nu
    return -rate * (direction + decay * f.p), kept, nu
