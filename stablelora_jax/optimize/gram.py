"""Algebra of r x r Gram matrices, batched, in the factors' dtype (float32 or wider), by ``eigh`` and matmuls alone.

A tall factor x (..., n, r) enters by its Gram matrix ``x^T x``: one batched ``eigh`` of r x r matrices serves every
layer, and the products with n rows are matmuls, which every backend does well. Directions whose singular value is below
``sqrt(r eps)`` of the largest (1e-3 in float32, 4e-8 in float64) count as missing, so that a factor that is zero, or of
lower rank than it has columns, gives finite numbers and no noise. QR and Cholesky are avoided on purpose: two batched
ones in a program deadlock now and then on jaxlib 0.10's CPU backend, and on GPUs they run matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def transpose(x: jax.Array) -> jax.Array:
    """The last two axes exchanged."""
    return jnp.swapaxes(x, -1, -2)


def gram(x: jax.Array) -> jax.Array:
    """``x^T x``: (..., n, r) to (..., r, r)."""
    return transpose(x) @ x


def symmetric(x: jax.Array) -> jax.Array:
    """``(x + x^T) / 2``."""
    return (x + transpose(x)) / 2


def eigh(matrices: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices (P, r, r): one batched call for each r."""
    found: list[Any] = [None] * len(matrices)
    for size in sorted({matrix.shape[-1] for matrix in matrices}):
        places = [i for i, matrix in enumerate(matrices) if matrix.shape[-1] == size]
        values, vectors = jnp.linalg.eigh(jnp.concatenate([symmetric(matrices[i]) for i in places]))
        start = 0
        for i in places:
            stop = start + len(matrices[i])
            found[i], start = (values[start:stop], vectors[start:stop]), stop
    return found


def power(values: jax.Array, vectors: jax.Array, exponent: float, damping: Any = 0.0) -> jax.Array:
    """``(X + damping I)^exponent`` for a negative exponent, from the eigenvalues of X >= 0; zero where X is not."""
    damped = jnp.maximum(values, 0) + damping
    kept = damped > _smallest(damped)
    scaled = jnp.where(kept, jnp.where(kept, damped, 1) ** exponent, 0)
    return (vectors * scaled[..., None, :]) @ transpose(vectors)


def inverses(matrices: Sequence[jax.Array], damping: Any = 0.0) -> list[jax.Array]:
    """``(X + damping I)^-1`` of Gram matrices X; the pseudo-inverse where that is singular."""
    return [power(values, vectors, -1.0, damping) for values, vectors in eigh(matrices)]


def orthonormal(factors: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """``(q, t)`` of each tall factor x: ``q = x t`` is orthonormal and spans the columns of x; t = pinv(q^T x).

    Where x has lower rank than columns, ``q^T q`` is a projection instead of the identity. The second round repairs
    what the squared condition number of the first has cost.
    """
    first = [_whiten(*pair) for pair in eigh([gram(x) for x in factors])]
    rough = [x @ t for x, t in zip(factors, first, strict=True)]
    second = [power(values, vectors, -0.5) for values, vectors in eigh([gram(q) for q in rough])]
    return [(q @ u, t @ u) for q, t, u in zip(rough, first, second, strict=True)]


def _whiten(values: jax.Array, vectors: jax.Array) -> jax.Array:
    kept = values > _smallest(values)
    return vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)[..., None, :]


def _smallest(values: jax.Array) -> jax.Array:
    """The least eigenvalue that is more than rounding, (..., 1)."""
    size = values.shape[-1]
    return jnp.maximum(values.max(-1, keepdims=True) * size * jnp.finfo(values.dtype).eps, 0)
