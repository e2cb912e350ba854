"""The cache of keys and values, so that the next token costs one token's work.

Slots are filled in the order of the calls, the same slots for every row. Each slot records the position of its token in
its own row, so pads may be anywhere: neither left nor right padding is assumed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from stablelora_jax.models.architecture import DecoderConfig


class Cache(NamedTuple):
    """S slots for each of B rows. For ``jax.vmap`` over rows: axes 1, 1, 0 and None."""

    k: Float[Array, "L B S K hd"]  # rotated to their positions
    v: Float[Array, "L B S K hd"]
    positions: Int[Array, "B S"]  # int32; -1 where the slot is empty or is a pad's
    used: Int[Array, ""]  # int32: slots written so far, in all rows


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: DTypeLike) -> Cache:
    """A cache with no token; in ``accum_dtype`` of the model's dtype it changes no logit."""
    shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
    positions = jnp.full((rows, slots), -1, jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.zeros((), jnp.int32))


def positions_of(mask: ArrayLike) -> Int[Array, "B T"]:
    """Positions, int32, of the tokens where ``mask`` (B, T) is 1, as tokenizers give it; -1 at pads.

    Example::

        >>> positions_of(jnp.array([[0, 1, 1], [1, 1, 0]]))
        Array([[-1,  0,  1],
               [ 0,  1, -1]], dtype=int32)
    """
    mask = jnp.asarray(mask, bool)
    return jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)


def write(past: jax.Array, new: jax.Array, slot: ArrayLike, axis: int) -> jax.Array:
    """``past`` with ``new``, in its dtype, from index ``slot`` of ``axis`` on."""
    return jax.lax.dynamic_update_slice_in_dim(past, new.astype(past.dtype), slot, axis)
