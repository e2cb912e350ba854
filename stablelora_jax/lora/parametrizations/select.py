"""A few inputs or outputs of a kernel, drawn once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stablelora_jax.utils.errors import InputError


def drawn(key: jax.Array, size: int, rank: int) -> Int[Array, " r"]:
    """``rank`` of ``size`` numbers, uniformly without replacement, sorted.

    Raises:
      InputError: there are not as many.
    """
    if rank > size:
        raise InputError(f"{rank} of {size} inputs or outputs cannot be chosen: lower the rank")
    return jnp.sort(jax.random.permutation(key, size)[:rank]).astype(jnp.int32)


def selector(index: Int[Array, " r"], size: int, dtype: jnp.dtype) -> Float[Array, "size r"]:
    """The matrix whose columns are the standard basis vectors of ``index``."""
    return (jnp.arange(size)[:, None] == index[None]).astype(dtype)
