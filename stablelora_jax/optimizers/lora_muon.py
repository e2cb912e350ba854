"""LoRA-Muon: Muon's step on matrices of rank r (Cesista and others, arXiv 2606.12921, Algorithm 1).

With A, B tall, s the LoRA scale and msign(X) = U V^T for X = U S V^T, Jacobi over both factors::

    M  <- beta M + (1 - beta) gA                        B's momentum likewise
    RB = (B^T B + damping ||B^T B||_F I)^-1/2           (r, r)
    dA = -eta / (2 s) msign(M RB) RB                    so that s dA B^T = -eta / 2 msign(M RB) Q^T, Q = B RB
    k  = sqrt(1 - eta w)
    A  <- k A + dA / k                                  A B^T decays by 1 - eta w, and dA B^T is what it was

The size of the gradients cancels: to first order the kernel moves by at most eta in the spectral norm, at any rank and
width. With damping = 0 the trajectory of A B^T is the same for every factorisation. With B = 0 the first step is B's.

Differences: the paper has no s; the rule is that of the pair sqrt(s) A, sqrt(s) B. Its Appendix B takes msign and the
inverse root from polynomials of 8 and 7 steps (Polar Express); here both are exact, by eigh. Its rebalancing of the two
norms, an option that leaves A B^T as it is, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, pairwise, value
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.linalg import Spectrum, polar, power, spectra
from stablelora_jax.optimizers.pair_tree import Scale, others_by_adamw


class LoraMuonState(NamedTuple):
    """State of a pair."""

    mu: Pair  # momenta of the gradients, tall


def lora_muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    damping: float = 1e-5,
    scale: Scale = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Muon; leaves outside pairs get AdamW with b1 = 0.9, b2 = 0.999 and eps = 1e-8.

    Args:
      learning_rate: scalar or schedule: the largest change of the kernel in a step, in the spectral norm.
      momentum: decay of the averages of the gradients.
      weight_decay: scalar or schedule, of the product A B^T; times the rate, it must stay below 1.
      damping: added to the Gram matrices' diagonals, as a share of their Frobenius norms.
      scale: the LoRA scale s: ``scales(adapters, spec)``; 1.0 only where alpha equals the rank.

    Raises:
      InputError: a number out of range, or a scale that is missing for a pair.
    """
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, momentum=momentum, damping=damping)

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, LoraMuonState]]:
        del extra
        rate = value(learning_rate, count)
        kept = jnp.sqrt(1 - rate * value(weight_decay, count))
        moments = [_averaged(g.state.mu, g.grads, momentum) for g in groups]
        by = [_inverse_root(of, damping) for of in spectra([x for g in groups for x in (g.params.b, g.params.a)])]
        signs = polar([x @ root for x, root in zip([x for mu in moments for x in mu], by, strict=True)])
        moves = [-rate / 2 * sign @ root for sign, root in zip(signs, by, strict=True)]
        return [
            (_step(g, Pair(a, b), kept), LoraMuonState(mu))
            for g, mu, a, b in zip(groups, moments, moves[::2], moves[1::2], strict=True)
        ]

    pairs = pairwise(lambda pair: LoraMuonState(jax.tree.map(jnp.zeros_like, pair)), update, scale)
    return of_pairs(others_by_adamw(pairs, learning_rate, weight_decay=weight_decay))


def _averaged(mu: Pair, grads: Pair, momentum: Any) -> Pair:
    return Pair(*(momentum * x + (1 - momentum) * g for x, g in zip(mu, grads, strict=True)))


def _inverse_root(of: Spectrum, damping: Any) -> jax.Array:
    """``(x^T x + damping ||x^T x||_F I)^-1/2``, (P, r, r)."""
    size = jnp.linalg.norm(of.values, axis=-1, keepdims=True)
    return power(of.values, of.vectors, -0.5, damping * size) / of.scale


def _step(g: Group, move: Pair, kept: jax.Array) -> Pair:
    """``k p + move / (s k) - p`` of both factors."""
    s = g.scale[:, None, None]
    return Pair(*((kept - 1) * p + x / s / kept for p, x in zip(g.params, move, strict=True)))
