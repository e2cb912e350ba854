"""Rotary position embeddings (Su et al., arXiv 2104.09864) with the scalings of Llama models.

Frequencies are ``theta ** (-2i / head_dim)``. ``linear`` divides all of them by ``factor``; ``llama3`` divides those
whose wavelength exceeds ``original / low_freq_factor``, keeps those below ``original / high_freq_factor`` and blends
in between (Llama 3.1; ``transformers/modeling_rope_utils.py``). Dimension i is rotated with ``i + head_dim / 2``, not
with its neighbour: Hugging Face's layout of q and k.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stablelora_jax.models.architecture import Rope


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each of the ``head_dim // 2`` rotated pairs, float64.

    Example::

        >>> frequencies(Rope(theta=100.0), 4)
        array([1. , 0.1])
    """
    freq: np.ndarray = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        freq = freq / rope.factor
    if rope.kind == "llama3":
        rotations = rope.original_max_position_embeddings * freq / (2 * np.pi)
        keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        freq = keep * freq + (1.0 - keep) * freq / rope.factor
    return freq


def angles(
    positions: Int[Array, "B T"], rope: Rope, head_dim: int, dtype: DTypeLike
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosines and sines of the rotations at ``positions``, in ``dtype``; the same for all layers."""
    freq = jnp.asarray(frequencies(rope, head_dim), dtype)
    angle = positions[..., None, None].astype(dtype) * freq[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T heads hd"], rope_cos_sin: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]
) -> Float[Array, "B T heads hd"]:
    """Rotate queries or keys ``x`` by the cosines and sines of :func:`angles`; keeps the dtype of ``x``."""
    cos, sin = rope_cos_sin
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
