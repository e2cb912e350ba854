"""The singular value decomposition with signs that are the same on every machine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def decomposed(w: Float[Array, "in out"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``U (in, p), S (p,), V^T (p, out)`` of the thin decomposition, p = min(in, out), at least in float32.

    The signs, which no decomposition fixes, are such that the largest number of each column of U is positive: so a
    start is the same on every machine.
    """
    return signed(*jnp.linalg.svd(w.astype(jnp.promote_types(w.dtype, jnp.float32)), full_matrices=False))


def signed(u: jax.Array, s: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A decomposition with the signs of :func:`decomposed`."""
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)
    sign = jnp.where(largest[0] < 0, -1, 1).astype(u.dtype)
    return u * sign[None], s, vt * sign[:, None]
