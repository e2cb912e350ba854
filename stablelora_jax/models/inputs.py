"""What a decoder is called with: shapes and kinds, which are known while tracing, and ids, which are not.

An id in a pad never matters, whatever it is. A token that the vocabulary does not hold, a negative one too, makes its
row NaN, and is never taken for another token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.utils.errors import InputError

INT32 = np.iinfo(np.int32)


def integers(value: Any, name: str, shape: tuple[int, ...] | None = None) -> jax.Array:
    """``value`` as an array of whole numbers, of ``shape``, or (rows, columns) with at least one of each.

    Numbers of the host that are beyond int32 become -1, which is no token, no segment and no position.

    Raises:
      InputError: it is something else.
    """
    try:
        value = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:  # rows of different lengths
        value = np.array(None)
    if not (jnp.issubdtype(value.dtype, np.integer) and value.ndim == 2 and 0 not in value.shape):
        kind = f"{value.dtype} {value.shape}"
        raise InputError(f"{name} must be whole numbers (rows, columns), at least one of each, not {kind}")
    if shape is not None and value.shape != shape:
        raise InputError(f"{name} must have the shape of the tokens, {shape}, not {value.shape}")
    if isinstance(value, np.ndarray) and value.dtype.itemsize >= 4:
        value = np.where((value > INT32.max) | (value < INT32.min), -1, value).astype(np.int32)
    return jnp.asarray(value)


def places(at: Any, tokens: jax.Array) -> jax.Array:
    """``at`` (B, K), for ``tokens`` (B, T).

    Raises:
      InputError: it is something else.
    """
    at = integers(at, "at")
    if at.shape[0] != tokens.shape[0]:
        raise InputError(f"at must name places in each of {tokens.shape[0]} rows, not in {at.shape[0]}")
    return at


def require_known(ids: Any, vocabulary: int, origin: str = "the model") -> None:
    """Check ids on the host, before they are read.

    Raises:
      InputError: one is negative, or not below ``vocabulary``.
    """
    ids = np.asarray(ids)
    if ids.size and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise InputError(f"the tokenizer of {origin} gives ids beyond its vocabulary of {vocabulary}")


def known(tokens: jax.Array, pads: jax.Array | None, vocabulary: int) -> jax.Array:
    """``tokens`` with 0 where ``pads`` is true, and ``vocabulary``, which a look-up gives NaN for, at unknown ids."""
    tokens = jnp.where((tokens < 0) | (tokens >= vocabulary), vocabulary, tokens).astype(jnp.int32)
    return tokens if pads is None else jnp.where(pads, 0, tokens)
