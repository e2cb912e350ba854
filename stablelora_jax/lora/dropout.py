"""Dropout on the input of the low-rank path: masks that depend on the key, the module's name and the row alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.utils.errors import InputError


def drop(x: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Inverted dropout with one key, or one key for each index of the first axis of ``x``; so for the rate."""
    if key.ndim and key.shape[0] != x.shape[0]:
        raise InputError(f"{key.shape[0]} dropout keys for an input of {x.shape}: rows must be its first axis")
    keep = 1.0 - rate
    rows: Any = jax.vmap(lambda k, keep: jax.random.bernoulli(k, keep, x.shape[1:]), (0, 0 if keep.ndim else None))
    mask = rows(key, keep) if key.ndim else jax.random.bernoulli(key, keep, x.shape)
    keep = jnp.expand_dims(keep, range(keep.ndim, x.ndim)) if keep.ndim else keep
    return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def split_rngs(rngs: Any) -> tuple[Any, Any]:
    """The keys of the low-rank path as typed keys, and the rngs to hand on to the model."""
    if rngs is None:
        return None, None
    if not isinstance(rngs, Mapping):
        return (_typed(rngs), rngs)
    if "dropout" not in rngs:
        return None, rngs
    keys = _typed(rngs["dropout"])
    return keys, {**rngs, "dropout": keys[0] if keys.ndim else keys}


def _typed(keys: Any) -> jax.Array:
    keys = jnp.asarray(keys)
    found: jax.Array = keys if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(keys)
    return found


def target_keys(keys: jax.Array, target: TargetModule) -> jax.Array:
    """Raw keys (stack..., [B,] words): one for each module, by its name, so that scanned equals unrolled."""
    marks = jnp.asarray([zlib.crc32(name.encode()) for name in target.names], jnp.uint32)
    fold = jax.vmap(jax.random.fold_in, (0, None)) if keys.ndim else jax.random.fold_in
    data = jax.random.key_data(jax.vmap(lambda mark: fold(keys, mark))(marks))
    return data.reshape(*target.stack, *data.shape[1:])
