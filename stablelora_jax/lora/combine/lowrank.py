"""Matrices as products of two thin ones, by their singular values.

The signs of singular vectors are a backend's choice; here the greatest entry of each left one is positive.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Svd = tuple[jax.Array, jax.Array, jax.Array]


def svd_of_product(a: jax.Array, b: jax.Array) -> Svd:
    """``(u, s, v)`` with ``u diag(s) v = a b``, for a (in, R) and b (R, out), by matrices of R columns only."""
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(b.T)
    u, s, v = jnp.linalg.svd(ra @ rb.T, full_matrices=False)
    return qa @ u, s, v @ qb.T


def truncated(u: jax.Array, s: jax.Array, v: jax.Array, rank: int, clamp: float | None) -> tuple[jax.Array, jax.Array]:
    """``(u, diag(s) v)`` of the greatest ``rank`` values: (in, r) and (r, out), r at most ``rank``.

    With ``clamp``, both are cut to plus and minus that quantile of all their entries.
    """
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), 0)[None], 0)[0]
    signs = jnp.where(largest < 0, -1, 1).astype(u.dtype)
    a, b = u * signs[None], (s * signs)[:, None] * v
    if clamp is None:
        return a, b
    bound = jnp.quantile(jnp.concatenate([a.reshape(-1), b.reshape(-1)]), clamp)
    return jnp.clip(a, -bound, bound), jnp.clip(b, -bound, bound)
