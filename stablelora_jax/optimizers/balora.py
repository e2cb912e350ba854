"""BaLoRA: A and B balanced after every step (Castin and others, ICML 2026, arXiv 2605.31484, Algorithms 1 and 2). ::

    A, B <- inner(A, B)
    A B^T = U S V^T                   of rank r, singular values descending
    A, B <- U S^1/2,  V S^1/2         A B^T as it was, A^T A = B^T B = S

Among all factorisations of A B^T this one has the best conditioned Hessian at a minimum. No (in, out) matrix is formed:
with orthonormal bases QA, QB of the factors, the singular vectors are those of QA^T A B^T QB, (r, r). The moments of
the inner optimizer stay as they are, as in the released code. The paper takes AdamW.

Where the paper leaves a choice: column k of U and V has the sign with which A's new column points along A's old one. A
pair whose product has lower rank than columns in use, above all one with B = 0, is not projected in that step: both of
a missing direction's columns would be zero, and would get no gradient ever again. (The released code leaves them zero,
which a first step at rate zero makes of the whole pair.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, pairwise, used
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers, require_whole
from stablelora_jax.optimizers.linalg import Svd, orthonormal, safe_scale, svd, transpose
from stablelora_jax.utils.errors import InputError


def balora(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """AdamW, and the projection after it; leaves outside pairs get AdamW.

    Args:
      learning_rate: scalar or schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule.
      every: steps from one projection to the next.

    Raises:
      InputError: a number out of range.
    """
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    return balance_after(optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay), every)


def balance_after(inner: optax.GradientTransformation, every: int = 1) -> optax.GradientTransformationExtraArgs:
    """Wrap ``inner`` so that the factors of each pair are balanced after its step.

    Args:
      inner: any transformation; a scale that follows the wrapper in a chain would scale the projection.
      every: steps from one projection to the next.

    Raises:
      InputError: an ``inner`` that is no transformation, an ``every`` below 1.
    """
    require_whole(1, every=every)
    if not isinstance(inner, optax.GradientTransformation):
        raise InputError(f"inner must be an optax.GradientTransformation, not {inner!r:.60}")

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, Any]]:
        del extra
        moved = [jax.tree.map(jnp.add, g.params, g.grads) for g in groups]
        due = (count + 1) % every == 0

        def step(g: Group, pair: Pair, balanced: Pair, full: jax.Array) -> Pair:
            a, b = _turned(balanced, pair.a)
            change = Pair(a - g.params.a, b - g.params.b)
            return Pair(*(jnp.where(due & full, x, u) for x, u in zip(change, g.grads, strict=True)))

        return [(step(g, pair, *found), None) for g, pair, found in zip(groups, moved, _balanced(moved), strict=True)]

    return of_pairs(optax.chain(inner, pairwise(lambda pair: None, update)))


def _balanced(pairs: Sequence[Pair]) -> list[tuple[Pair, jax.Array]]:
    """The balanced factors of each batch, and whether the products have full rank, (P, 1, 1)."""
    sizes = [safe_scale(x) for pair in pairs for x in pair]
    bases = [q for q, _ in orthonormal([x for pair in pairs for x in pair])]
    inner = [transpose(q) @ (x / size) for q, x, size in zip(bases, [x for p in pairs for x in p], sizes, strict=True)]
    cores = svd([a @ transpose(b) for a, b in zip(inner[::2], inner[1::2], strict=True)])
    found = []
    for pair, core, qa, qb, sa, sb in zip(pairs, cores, bases[::2], bases[1::2], sizes[::2], sizes[1::2], strict=True):
        root = jnp.sqrt(core.values)[:, None, :] * jnp.sqrt(sa) * jnp.sqrt(sb)
        full = (core.values > _least(core)).sum(-1) == used(pair).sum(-1)
        found.append((Pair(qa @ core.left * root, qb @ core.right * root), full[:, None, None]))
    return found


def _least(core: Svd) -> jax.Array:
    """The least singular value that is more than rounding, (P, 1)."""
    return core.values[:, :1] * 4 * core.values.shape[-1] * jnp.finfo(core.values.dtype).eps


def _turned(pair: Pair, old: jax.Array) -> Pair:
    """``pair`` with the signs of columns that bring its A nearest to ``old``."""
    sign = jnp.where((pair.a * (old / safe_scale(old))).sum(-2, keepdims=True) < 0, -1, 1)
    return Pair(pair.a * sign, pair.b * sign)
