"""What tokens see of the slots of a cache, under sliding windows; of whole rows, see ``attention.py``."""

from __future__ import annotations

import jax.numpy as jnp

FAR = jnp.iinfo(jnp.int32).max


def cached_mask(positions, keys):
    """What tokens at ``positions`` (B, T) see of slots that hold ``keys`` (B, S), -1 where empty: (B, T, S) bool."""
    return (keys[:, None, :] <= positions[:, :, None]) & (keys >= 0)[:, None, :]


def windowed(mask, positions, keys, windows):
    """``mask`` (B, T, S) cut to what lies less than a window before; positions (B, T) see keys at ``keys`` (B, S).

    Where ``windows`` differ between layers it gives the distances instead, int32 and ``FAR`` where the mask is off, for
    each layer to compare with its own window.
    """
    if not any(windows):
        return mask
    distance = positions[:, :, None] - keys[:, None, :]
    return mask & (distance < windows[0]) if len(set(windows)) == 1 else jnp.where(mask, distance, FAR)
