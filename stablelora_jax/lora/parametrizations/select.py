"""A few inputs or outputs of a kernel, drawn once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from stablelora_jax.utils.errors import InputError


def drawn(key: jax.Array, size: int, rank: int) -> Int[Array, " r"]:
    """``rank`` of ``size`` numbers, uniformly without replacement, sorted.

    Raises:
      InputError: there are not as many.
    """
    if rank > size:
        raise InputError(f"{rank} of {size} inputs or outputs cannot be chosen: lower the rank")
    return jnp.sort(jax.random.permutation(key, size)[:rank]).astype(jnp.int32)


def drawn_of_many(key: jax.Array, size: int, count: int) -> Int[Array, " count"]:
    """``count`` of ``size`` numbers, uniformly without replacement, sorted, in memory of the order of ``count``.

    Numbers are drawn with replacement, and what is drawn twice is drawn again until all differ. No step depends on
    which numbers they are, only on which are equal: so every set has the same probability. Where more than a quarter is
    chosen, a permutation of all takes no more memory, and no longer.
    """
    if 4 * count > size:
        return jnp.sort(jax.random.permutation(key, size)[:count]).astype(jnp.int32)

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, draw = jax.random.split(state[0])
        fresh = jax.random.randint(draw, (count,), 0, size, jnp.int32)
        return key, jnp.sort(jnp.where(_repeats(state[1]), fresh, state[1]))

    key, draw = jax.random.split(key)
    first = key, jnp.sort(jax.random.randint(draw, (count,), 0, size, jnp.int32))
    found: jax.Array = jax.lax.while_loop(lambda state: _repeats(state[1]).any(), again, first)[1]
    return found


def _repeats(index: Int[Array, " count"]) -> Bool[Array, " count"]:
    """Which of sorted numbers are the one before."""
    return jnp.concatenate([jnp.zeros(1, bool), index[1:] == index[:-1]])


def selector(index: Int[Array, " r"], size: int, dtype: jnp.dtype) -> Float[Array, "size r"]:
    """The matrix whose columns are the standard basis vectors of ``index``."""
    return (jnp.arange(size)[:, None] == index[None]).astype(dtype)
