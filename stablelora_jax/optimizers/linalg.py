"""Algebra of r x r Gram matrices, batched, in the factors' dtype (float32 or wider), by ``eigh`` and matmuls alone.

A tall factor x (..., n, r) enters by its Gram matrix ``x^T x``: one batched ``eigh`` of r x r matrices serves every
layer, and the products with n rows are matmuls, which every backend does well. Directions that rounding cannot tell
from zero count as missing, so that a factor that is zero, or of lower rank than it has columns, gives finite numbers
and no noise: in an inverse, those below ``sqrt(r eps)`` of the largest singular value (1e-3 in float32).

Squares of factors beyond 1e19 leave float32. What takes factors here divides those beyond 2^32 by a power of two,
:func:`safe_scale`, and keeps it beside the result; ordinary factors are divided by 1 and keep their bits.

QR and Cholesky are avoided, since on GPUs they run matrix by matrix. On CPU eigh does so too: jaxlib 0.10 shares a
batch out among threads and waits for them in a thread of the same pool, so that two batched calls of any
decomposition that run at one time, in one program or on two devices, wait for each other for ever (seen with 336
matrices of 16 x 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Spectrum(NamedTuple):
    """``x^T x = scale^2 vectors diag(values) vectors^T`` of tall factors x (P, n, r)."""

    values: jax.Array  # (P, r), ascending
    vectors: jax.Array  # (P, r, r)
    scale: jax.Array  # (P, 1, 1)


class Svd(NamedTuple):
    """``x = left diag(values) right^T`` of square matrices x (P, r, r)."""

    left: jax.Array  # (P, r, r)
    values: jax.Array  # (P, r), descending, >= 0
    right: jax.Array  # (P, r, r)


class Inverse(NamedTuple):
    """``(x^T x + damping I)^-1 = matrix / scale^2``."""

    matrix: jax.Array  # (P, r, r)
    scale: jax.Array  # (P, 1, 1)


def transpose(x: Float[Array, "*batch n m"]) -> Float[Array, "*batch m n"]:
    """The last two axes exchanged."""
    return jnp.swapaxes(x, -1, -2)


def gram(x: Float[Array, "*batch n r"]) -> Float[Array, "*batch r r"]:
    """``x^T x``: (..., n, r) to (..., r, r)."""
    return transpose(x) @ x


def symmetric(x: Float[Array, "*batch r r"]) -> Float[Array, "*batch r r"]:
    """``(x + x^T) / 2``."""
    return (x + transpose(x)) / 2


def eigh(matrices: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices (P, r, r): one batched call for each r."""
    found: list[Any] = [None] * len(matrices)
    for size in sorted({matrix.shape[-1] for matrix in matrices}):
        places = [i for i, matrix in enumerate(matrices) if matrix.shape[-1] == size]
        values, vectors = _eigh(jnp.concatenate([symmetric(matrices[i]) for i in places]))
        start = 0
        for i in places:
            stop = start + len(matrices[i])
            found[i], start = (values[start:stop], vectors[start:stop]), stop
    return found


def power(
    values: Float[Array, "*batch r"], vectors: Float[Array, "*batch r r"], exponent: float, damping: Any = 0.0
) -> Float[Array, "*batch r r"]:
    """``(X + damping I)^exponent`` for a negative exponent, from the eigenvalues of X >= 0; zero where X is not."""
    damped = jnp.maximum(values, 0) + damping
    kept = ~(damped <= _smallest(damped))  # NaN is kept
    scaled = jnp.where(kept, jnp.where(kept, damped, 1) ** exponent, 0)
    return (vectors * scaled[..., None, :]) @ transpose(vectors)


def safe_scale(x: Float[Array, "*batch n r"]) -> Float[Array, "*batch 1 1"]:
    """A power of two (..., 1, 1) that brings x (..., n, r) to a size whose squares are finite; 1 up to 2^32."""
    size = jnp.abs(x).max(axis=(-2, -1), keepdims=True)
    return jnp.where(size > 2.0**80, 2.0**96, jnp.where(size > 2.0**32, 2.0**56, 1.0)).astype(x.dtype)


def spectra(factors: Sequence[jax.Array]) -> list[Spectrum]:
    """The decompositions of ``x^T x``."""
    scales = [safe_scale(x) for x in factors]
    found = eigh([gram(x / scale) for x, scale in zip(factors, scales, strict=True)])
    return [Spectrum(*pair, scale) for pair, scale in zip(found, scales, strict=True)]


def inverse(of: Spectrum, damping: Any = 0.0) -> Inverse:
    """``(x^T x + damping I)^-1``; the pseudo-inverse where that is singular."""
    return Inverse(power(of.values, of.vectors, -1.0, damping / of.scale[..., 0] / of.scale[..., 0]), of.scale)


def inverses(factors: Sequence[jax.Array], damping: Any = 0.0) -> list[Inverse]:
    """:func:`inverse` of each tall factor."""
    return [inverse(of, damping) for of in spectra(factors)]


def times(x: Float[Array, "*batch n r"], by: Inverse) -> Float[Array, "*batch n r"]:
    """``x (y^T y + damping I)^-1``."""
    return x @ by.matrix / by.scale / by.scale


def orthonormal(factors: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """``(q, t)`` of each tall factor x: ``q = x t`` is orthonormal and spans the columns of x; t = pinv(q^T x).

    Where x has lower rank than columns, ``q^T q`` is a projection instead of the identity. Three rounds: the first,
    with a shift that keeps small directions apart from rounding, leaves a condition number below ``1 / sqrt(eps)``; the
    second whitens; the third repairs what that has cost (shifted CholeskyQR3, arXiv 1809.11085, with eigh). Directions
    below about ``10 r eps`` of the largest (1e-5 in float32) are missing.
    """
    scales = [safe_scale(x) for x in factors]
    factors = [x / scale for x, scale in zip(factors, scales, strict=True)]
    t = [_whiten(*found) for found in eigh([gram(x) for x in factors])]
    rough = [x @ u for x, u in zip(factors, t, strict=True)]
    for _ in range(2):
        round_ = [power(values, vectors, -0.5) for values, vectors in eigh([gram(q) for q in rough])]
        rough = [q @ u for q, u in zip(rough, round_, strict=True)]
        t = [before @ u for before, u in zip(t, round_, strict=True)]
    return [(q, u / scale) for q, u, scale in zip(rough, t, scales, strict=True)]


def polar(factors: Sequence[jax.Array]) -> list[jax.Array]:
    """``x (x^T x)^-1/2`` of each tall factor x, (P, n, r): U V^T of ``x = U S V^T`` without the missing directions.

    Three rounds as in :func:`orthonormal`, each by a symmetric root, so that what they whiten is not turned.
    """
    sizes = [jnp.abs(x).max(axis=(-2, -1), keepdims=True) for x in factors]
    found = [x / jnp.where(size > 0, size, 1) for x, size in zip(factors, sizes, strict=True)]
    for shifted in (True, False, False):
        spectra_ = eigh([gram(x) for x in found])
        roots = [power(values, vectors, -0.5, _smallest(values) * shifted) for values, vectors in spectra_]
        found = [x @ root for x, root in zip(found, roots, strict=True)]
    return found


def svd(matrices: Sequence[jax.Array]) -> list[Svd]:
    """Singular values and vectors of square matrices x, by ``eigh`` of the symmetric (2r, 2r) of x and its transpose.

    Values far below the largest come with its absolute error; vectors of missing directions are not orthonormal.
    """
    found = []
    for values, vectors in eigh([_dilated(x) for x in matrices]):
        r = values.shape[-1] // 2
        top = vectors[..., r:][..., ::-1] * jnp.sqrt(2.0).astype(vectors.dtype)
        found.append(Svd(top[:, :r], jnp.maximum(values[..., r:][..., ::-1], 0), top[:, r:]))
    return found


def _dilated(x: jax.Array) -> jax.Array:
    zeros = jnp.zeros_like(x)
    return jnp.concatenate([jnp.concatenate([zeros, x], -1), jnp.concatenate([transpose(x), zeros], -1)], -2)


def _eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Batched, but one after the other on CPU: see the module's docstring."""

    def one_by_one(x: jax.Array) -> Any:
        return jax.lax.map(lambda matrix: tuple(jnp.linalg.eigh(matrix)), x)

    found: tuple[jax.Array, jax.Array] = jax.lax.platform_dependent(
        matrices, cpu=one_by_one, default=lambda x: tuple(jnp.linalg.eigh(x))
    )
    return found


def _whiten(values: jax.Array, vectors: jax.Array) -> jax.Array:
    shift = _smallest(values)
    damped = jnp.maximum(values, 0) + shift
    return vectors * jnp.where(shift > 0, jax.lax.rsqrt(jnp.where(shift > 0, damped, 1)), 0)[..., None, :]


def _smallest(values: jax.Array) -> jax.Array:
    """The least eigenvalue that is more than rounding, (..., 1)."""
    size = values.shape[-1]
    return jnp.maximum(values.max(-1, keepdims=True) * size * jnp.finfo(values.dtype).eps, 0)
