"""Masks of tokens over the slots of a cache, with sliding windows; of whole rows, see ``attention.py``."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

FAR = np.iinfo(np.int32).max


def cached_mask(positions: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """True where a token at ``positions`` attends to the slot with position ``keys``, -1 where a slot is empty.

    Example::

        >>> cached_mask(jnp.array([[1, 2]]), jnp.array([[0, 1, 2, -1]])).astype(int)
        Array([[[1, 1, 0, 0],
                [1, 1, 1, 0]]], dtype=int32)
    """
    return (keys[:, None, :] <= positions[:, :, None]) & (keys >= 0)[:, None, :]


def windowed(
    mask: Bool[Array, "B T S"], positions: Int[Array, "B T"], keys: Int[Array, "B S"], windows: Sequence[int]
) -> Bool[Array, "B T S"] | Int[Array, "B T S"]:
    """``mask`` without the slots a window or more before the token; ``windows`` of the layers, 0 for none.

    Where ``windows`` differ between layers the result is the distances instead, int32 and ``FAR`` where the mask is
    off, for each layer to compare with its own window.
    """
    if not any(windows):
        return mask
    distance = positions[:, :, None] - keys[:, None, :]
    return mask & (distance < windows[0]) if len(set(windows)) == 1 else jnp.where(mask, distance, FAR)
