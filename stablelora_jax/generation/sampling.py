"""From logits to the next token: greedy, or sampled after temperature, top-k and top-p, in transformers' order.

    p = softmax(logits / temperature)                     only the k most likely tokens (and those as likely as the kth)
    kept = the fewest most likely of those whose renormalised p sums to top_p or more; at least one

(Top-k: Fan et al., arXiv 1805.04833; top-p: Holtzman et al., 1904.09751; the order and the ties of
``transformers/generation/logits_process.py``.) A row's token depends only on its own key and the step, so it is
the same in every batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from stablelora_jax.utils.errors import InputError

COLD = 1e-6  # a temperature below it is greedy
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Sampling(NamedTuple):
    """Settings of :func:`warp`, as numbers or traced scalars."""

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array = 0  # 0: all
    top_p: float | jax.Array = 1.0


def sampling(temperature: float, top_k: int | None, top_p: float | None) -> Sampling | None:
    """The settings as one value, None for greedy (temperature 0).

    Raises:
      InputError: a number out of its range, or top-k or top-p with greedy decoding.
    """
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be 0 (greedy) or a positive number, not {temperature!r}")
    if 0 < temperature < SMALLEST or temperature > LARGEST:
        raise InputError(f"temperature {temperature!r} is beyond float32's range: give 0 for greedy decoding")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"top_k must be a positive whole number, not {top_k!r}")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise InputError(f"top_p must be above 0 and at most 1, not {top_p!r}")
    if temperature == 0:
        if top_k is not None or top_p is not None:
            raise InputError("top_k and top_p act on sampling: give a temperature above 0, or leave them out")
        return None
    return Sampling(float(temperature), min(top_k or 0, 2**31 - 1), 1.0 if top_p is None else float(top_p))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def warp(logits: Float[Array, "*rows V"], settings: Sampling) -> Float[Array, "*rows V"]:
    """``logits`` over the temperature, and minus infinity at the tokens that top-k and top-p exclude.

    Example::

        >>> warp(jnp.array([1.0, 3.0, 2.0]), Sampling(temperature=2.0, top_k=2))
        Array([-inf,  1.5,  1. ], dtype=float32)
    """
    temperature = jnp.asarray(settings.temperature, logits.dtype)
    top = jnp.where(temperature < COLD, logits.max(axis=-1, keepdims=True), 0)  # no overflow when divided
    logits = (logits - top) / temperature
    V = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)  # the least likely first
    k = jnp.where(jnp.asarray(settings.top_k) > 0, jnp.minimum(settings.top_k, V), V)
    ranked = jnp.where(ranked >= jnp.take(ranked, V - k, axis=-1)[..., None], ranked, -jnp.inf)
    below = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    top_p = jnp.asarray(settings.top_p, logits.dtype)
    last = jax.lax.broadcasted_iota(jnp.int32, below.shape, below.ndim - 1) == V - 1
    kept = (below > 1 - top_p) | (top_p >= 1) | last
    ranked = jnp.where(kept, ranked, -jnp.inf)
    return jnp.put_along_axis(logits, order, ranked, axis=-1, inplace=False)


def row_keys(key: jax.Array, rows: Int[Array, " B"]) -> jax.Array:
    """One PRNG key for each row, by the numbers ``rows``; keys are typed or raw as ``key`` is."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def choose(
    logits: Float[Array, "B V"],
    settings: Sampling | None,
    keys: jax.Array,
    step: ArrayLike,
) -> Int[Array, " B"]:
    """The next token, int32, of each row of ``logits``: the most likely without ``settings``, otherwise sampled."""
    if settings is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys, warp(logits, settings)).astype(jnp.int32)
