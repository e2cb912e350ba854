"""Checks of a decoder's inputs: shapes and kinds, which are known while tracing, and ids, which are not.

The id of a pad never matters. A token outside the vocabulary, a negative one too, makes its row NaN, and is never taken
for another token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from stablelora_jax.utils.errors import InputError

INT32 = np.iinfo(np.int32)


def integers(value: Any, name: str, shape: tuple[int, ...] | None = None) -> jax.Array:
    """``value`` as an integer array of ``shape``, or by default of any (rows, columns) with at least one of each.

    Numbers on the host beyond int32 become -1, which is no token, no segment and no position.

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


def token_indices(value: Any, name: str, tokens: jax.Array) -> Int[Array, "B K"]:
    """``value`` as indices into the rows of ``tokens`` (B, T); ``name`` is the argument's in errors.

    Raises:
      InputError: ``value`` is no integer array of B rows.
    """
    indices = integers(value, name)
    if indices.shape[0] != tokens.shape[0]:
        raise InputError(f"{name} must have a row for each of {tokens.shape[0]} rows of tokens, not {indices.shape[0]}")
    return indices


def require_known(ids: Any, vocabulary: int, origin: str = "the model") -> None:
    """Check token ids on the host.

    Raises:
      InputError: one is negative, or not below ``vocabulary``.
    """
    ids = np.asarray(ids)
    if ids.size and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise InputError(f"the tokenizer of {origin} gives ids beyond its vocabulary of {vocabulary}")


def known(tokens: Int[Array, "B T"], pads: Bool[Array, "B T"] | None, vocabulary: int) -> Int[Array, "B T"]:
    """``tokens`` with 0 at ``pads`` and ``vocabulary`` at unknown ids, for which an embedding look-up gives NaN.

    Example::

        >>> known(jnp.array([[3, 9, -1]]), jnp.array([[False, False, True]]), 8)
        Array([[3, 8, 0]], dtype=int32)
    """
    tokens = jnp.where((tokens < 0) | (tokens >= vocabulary), vocabulary, tokens).astype(jnp.int32)
    return tokens if pads is None else jnp.where(pads, 0, tokens)
