"""What several starts share: a pair whose first product stays subtracted, a check, a decomposition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.utils.errors import InputError


def subtracted(a: Float[Array, "in r"], b: Float[Array, "r out"]) -> dict[str, jax.Array]:
    """The leaves of a pair that starts at ``a b`` without changing the function."""
    return {"lora_a": a, "lora_b": b, "frozen_a": a, "frozen_b": b}


def require_rank(init: str, w: jax.Array, rank: int) -> None:
    """Check that the kernel ``w`` (in, out) has ``rank`` directions to take.

    Raises:
      InputError: it has fewer rows or columns.
    """
    if rank > min(w.shape):
        raise InputError(f"init={init!r} takes {rank} directions of a kernel {w.shape}: lower the rank")


def decomposed(w: Float[Array, "in out"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``U (in, p), S (p,), V^T (p, out)`` of the thin decomposition, p = min(in, out), at least in float32.

    The signs, which no decomposition fixes, are such that the largest number of each column of U is positive: so a
    start is the same on every machine.
    """
    u, s, vt = jnp.linalg.svd(w.astype(jnp.promote_types(w.dtype, jnp.float32)), full_matrices=False)
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)
    sign = jnp.where(largest[0] < 0, -1, 1).astype(u.dtype)
    return u * sign[None], s, vt * sign[:, None]
