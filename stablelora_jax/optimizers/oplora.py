"""OPLoRA: the best rank-r step, by alternating least squares (Almansoori et al., arXiv 2509.19977). ::

    T = A B^T - (eta / s) D        what a step along D would make of the change, (in, out), never formed
    B <- B + (T - A B^T)^T A (A^T A + lam I)^-1                        ``rounds`` times, from the current A, B
    A <- A + (T - A B^T) B (B^T B + lam I)^-1

With D = G, the gradient of the kernel, ``rounds`` -> infinity gives the truncated SVD of T, and one or two rounds come
close. The first half-step is scaled GD on B. Factor gradients tell G only along A and B: by default D is the part they
tell, ``G - (I - PA) G (I - PB)``, the projection on the tangent space of the rank-r matrices, so that a step is a
Riemannian gradient step with its retraction, at the cost of LoRA. ``gradient="full"`` takes G itself from the extra
argument ``kernel_grads`` of ``update``: the gradients of the base's kernels (in, out), which cost their memory::

    grads, kernel_grads = jax.grad(loss, argnums=(0, 1))(adapters, params)
    updates, state = tx.update(grads, state, adapters, kernel_grads=kernel_grads)

(a kernel of more than two axes must contract its first ones, as Dense and DenseGeneral do over their last inputs).

With momentum b, D is a rank-r estimate of ``b D + (1 - b) G`` held as two factors by the same routine (LoRSum). At
lam = 0 each half-step is the least-squares solution, nothing depends on how A B^T is factored, and directions that the
other factor lacks stay. A small B then makes A leap: lam keeps a factor near to where it was.
``regularization="ridge"`` penalises the factors themselves instead, ``B <- T^T A (A^T A + lam I)^-1`` and so on, as a
summary of the paper has it; it shrinks both at every step and takes A to 0 where B = 0. Details of LoRSum and of the
K-FAC form were not to be had; the start of its alternation from A, the tangent and the proximal form are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, pairwise, value
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers, require_whole
from stablelora_jax.optimizers.linalg import Inverse, gram, inverse, inverses, orthonormal, spectra, transpose
from stablelora_jax.optimizers.pair_tree import Scale, others_by_adamw
from stablelora_jax.utils.errors import InputError

Terms = list[tuple[Any, Any, Any]]  # sum of c L R^T, or of c L where R is None; c a number or (P, 1, 1)


def oplora(
    learning_rate: optax.ScalarOrSchedule,
    rounds: int = 2,
    momentum: float | None = 0.9,
    lam: float = 1e-4,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    regularization: Literal["proximal", "ridge"] = "proximal",
    gradient: Literal["tangent", "full"] = "tangent",
    scale: Scale = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """OPLoRA; leaves outside pairs get AdamW at the same rate.

    Args:
      learning_rate: eta, scalar or schedule; the step on ``s A B^T`` is that of plain SGD on the kernel.
      rounds: alternations a step, at least 1; static.
      momentum: decay b of the low-rank momentum, of r (in + out) numbers a pair; None for none, and no state.
      lam: weight of the regularisation in both least-squares problems.
      regularization: of what: the distance to the old factor, or the factor itself.
      weight_decay: decoupled, scalar or schedule.
      gradient: ``"tangent"``, from the factor gradients alone, or ``"full"``, which needs ``kernel_grads``.
      scale: the LoRA scale s: ``scales(adapters, spec)``; 1.0 only where alpha equals the rank.

    Raises:
      InputError: a number out of range, an unknown ``gradient``; in ``update``, ``kernel_grads`` that are missing or
        unused.
    """
    require_whole(1, rounds=rounds)
    if gradient not in ("tangent", "full"):
        raise InputError(f"gradient must be tangent or full, not {gradient!r}")
    if regularization not in ("proximal", "ridge"):
        raise InputError(f"regularization must be proximal or ridge, not {regularization!r}")
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, lam=lam)
    if momentum is not None:
        require_numbers(momentum=momentum)
    ridge = lam if regularization == "ridge" else 0.0

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, Any]]:
        if (gradient == "full") != ("kernel_grads" in extra):
            raise InputError("oplora takes kernel_grads=... in update with gradient='full', and only then")
        rate, decay = value(learning_rate, count), value(weight_decay, count)
        seen = [_dense(g) for g in groups] if gradient == "full" else _tangents(groups)
        state = [g.state for g in groups]
        of_a = spectra([g.params.a for g in groups])
        if momentum is not None:
            sums = [[(momentum, *m), *_scaled(1 - momentum, d)] for m, d in zip(state, seen, strict=True)]
            state = _als(sums, [g.params for g in groups], of_a, rounds)
            seen = [[(1.0, *m)] for m in state]
        targets = [
            [(1.0, *g.params), *_scaled(-rate / g.scale[:, None, None], d)] for g, d in zip(groups, seen, strict=True)
        ]
        solved = _als(targets, [g.params for g in groups], of_a, rounds, lam, ridge)
        return [
            (jax.tree.map(lambda new, old: new - old - rate * decay * old, pair, g.params), after)
            for pair, g, after in zip(solved, groups, state, strict=True)
        ]

    def first_state(pair: Pair) -> Pair | None:
        return None if momentum is None else jax.tree.map(jnp.zeros_like, pair)

    return of_pairs(others_by_adamw(pairwise(first_state, update, scale), learning_rate, weight_decay=weight_decay))


def _tangents(groups: Sequence[Group]) -> list[Terms]:
    """The projections of G on the tangent spaces, as two terms of rank r."""
    bases = orthonormal([x for g in groups for x in g.params])
    found: list[Terms] = []
    for i, g in enumerate(groups):
        (q_a, t_a), (q_b, t_b), s = bases[2 * i], bases[2 * i + 1], g.scale[:, None, None]
        along_b = g.grads.a @ t_b / s  # G q_b
        beyond_a = along_b - q_a @ (transpose(q_a) @ along_b)
        found.append([(1.0, q_a, g.grads.b @ t_a / s), (1.0, beyond_a, q_b)])
    return found


def _dense(g: Group) -> Terms:
    return [(1.0, g.kernel_grads, None)]


def _scaled(factor: Any, terms: Terms) -> Terms:
    return [(factor * c, left, right) for c, left, right in terms]


def _als(
    targets: Sequence[Terms], start: Sequence[Pair], of_a: Sequence[Any], rounds: int, lam: Any = 0.0, ridge: Any = 0.0
) -> list[Pair]:
    """Rank-r factors of each target: B from A, then A from B, ``rounds`` times; ``of_a`` decomposes A's first Gram."""
    pairs = list(start)
    for number in range(rounds):
        found = of_a if number == 0 else spectra([p.a for p in pairs])
        pairs = [
            p._replace(b=_nearer(p.b, p.a, functools.partial(_transposed_times, t), inverse(of, lam), ridge))
            for t, p, of in zip(targets, pairs, found, strict=True)
        ]
        by_b = inverses([p.b for p in pairs], lam)
        pairs = [
            p._replace(a=_nearer(p.a, p.b, functools.partial(_times, t), by, ridge))
            for t, p, by in zip(targets, pairs, by_b, strict=True)
        ]
    return pairs


def _nearer(old: jax.Array, other: jax.Array, target: Any, by: Inverse, ridge: Any) -> jax.Array:
    """The factor that makes ``factor other^T`` nearest to the target, which is given as what multiplies ``other``."""
    other = other / by.scale
    missing = target(other) / by.scale - old @ gram(other) - ridge / by.scale / by.scale * old
    found: jax.Array = old + missing @ by.matrix
    return found


def _times(terms: Terms, x: jax.Array) -> jax.Array:
    found: jax.Array = sum(
        c * (left @ x if right is None else left @ (transpose(right) @ x)) for c, left, right in terms
    )
    return found


def _transposed_times(terms: Terms, x: jax.Array) -> jax.Array:
    parts = (transpose(left) @ x if right is None else right @ (transpose(left) @ x) for _, left, right in terms)
    found: jax.Array = sum(c * part for (c, _, _), part in zip(terms, parts, strict=True))
    return found
