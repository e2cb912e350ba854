"""The keys and values of the tokens a decoder has read, so that the next token costs one token's work.

Slots are filled in the order of the calls, the same slots for every row; what a slot holds is told by its position in
its own row, so pads may lie anywhere, and neither left nor right padding is assumed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.models.architecture import DecoderConfig


class Cache(NamedTuple):
    """S slots for each of B rows. For ``jax.vmap`` over rows: axes 1, 1, 0 and None."""

    k: jax.Array  # (L, B, S, K, hd), rotated to their positions
    v: jax.Array  # (L, B, S, K, hd)
    positions: jax.Array  # (B, S) int32; -1 where the slot is empty or holds a pad
    used: jax.Array  # int32 scalar: slots written so far, by all rows


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: DTypeLike) -> Cache:
    """A cache that holds nothing; in the wide dtype (``decoder.wide``) it changes no logit."""
    shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
    positions = jnp.full((rows, slots), -1, jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.zeros((), jnp.int32))


def positions_of(mask: jax.Array) -> jax.Array:
    """Positions (B, T) int32 of the tokens that ``mask`` (B, T), 1 or 0 as tokenizers give it, names; -1 at pads."""
    mask = jnp.asarray(mask, bool)
    return jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)


def write(past: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    """``past`` with ``new``, in its dtype, from index ``slot`` of ``axis`` on."""
    return jax.lax.dynamic_update_slice_in_dim(past, new.astype(past.dtype), slot, axis)
