"""Rotary position embeddings (Su et al., arXiv 2104.09864) with the scalings of Llama models.

Frequencies are ``theta ** (-2i / head_dim)``. ``linear`` divides all of them by ``factor``; ``llama3`` divides those
whose wavelength exceeds ``original / low_freq_factor``, keeps those below ``original / high_freq_factor`` and blends
in between (Llama 3.1; ``transformers/modeling_rope_utils.py``). Halves are rotated, not neighbours: Hugging Face's
layout of q and k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from stablelora_jax.models.architecture import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position for each of the ``head_dim // 2`` rotated pairs, radians, float64."""
    freq = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * freq / (2 * np.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return keep * freq + (1.0 - keep) * freq / rope.factor
    return freq


def angles(positions: ArrayLike, rope: Rope, head_dim: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (B, T, 1, head_dim // 2) of the turns at ``positions`` (B, T) int32; all layers share them."""
    freq = jnp.asarray(frequencies(rope, head_dim), dtype)
    turn = jnp.asarray(positions)[..., None, None].astype(dtype) * freq
    return jnp.cos(turn), jnp.sin(turn)


def rotate(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate queries or keys ``x`` (B, T, heads, head_dim) by ``turns`` of :func:`angles`; keeps the dtype of ``x``."""
    cos, sin = turns
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
