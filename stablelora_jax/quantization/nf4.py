"""NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3 and appendix E), in bitsandbytes' bytes.

A weight (out, in), in Hugging Face's layout, is one row of n numbers, in blocks of 64. Each block has the scale
``a = max |w|``, and each number the nearest of 16 levels, quantiles of the normal distribution::

    w ~ LEVELS[c] a        c: four bits, two to a byte, the first in the upper half
    a ~ MAP[d] e + m       d: eight bits; m: the mean of the scales; e = max |a - m| over 256 of them

which is 4 + 8/64 + 32/(64 * 256) = 4.127 bits a number, and 32 a weight. The midpoint of two levels rounds down.
Levels, map and rules are those of bitsandbytes 0.50, ``quantize_4bit(compress_statistics=True, quant_type="nf4")``.
The bytes of c are equal to its bytes. The bytes of d are equal where m is: the last bit of this float32 mean depends on
the order of summation (and its CPU code looks d up in a table that misses a few). A block of zeros decodes to zeros:
its c are 7 and ``LEVELS[7]`` is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stablelora_jax.quantization.leaf import Quantized

BLOCK, GROUP = 64, 256
TINY = np.finfo(np.float32).tiny  # instead of a scale of 0
LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    + [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
    + [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)


def _dynamic_map() -> np.ndarray:
    """bitsandbytes' ``create_dynamic_map()``: (256,) float32, sorted; 0, 1 and 127 magnitudes of either sign.

    For k = 0 .. 6 these are the midpoints of 2**k equal parts of [0.1, 1], times 10**(k - 6). The parts' ends are
    PyTorch's ``linspace`` in float32: computed from the nearer end, and rounded once.
    """
    single, found = np.float32, [np.float32(0.0), np.float32(1.0)]
    for k in range(7):
        n = 2**k
        i, step = np.arange(n + 1), float((single(1) - single(0.1)) / single(n))
        ends = np.where(i < (n + 1) // 2, float(single(0.1)) + step * i, 1 - step * (n - i)).astype(single)
        middles = single(10.0 ** (k - 6)) * ((ends[:-1] + ends[1:]) / single(2))
        found += [*middles, *-middles]
    return np.sort(np.array(found, single))


MAP = _dynamic_map()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4(Quantized):
    """A kernel of n = in * out numbers in 4.127 bits each."""

    packed: jax.Array  # (*stack, ceil(n / 2)) uint8: the levels
    absmax: jax.Array  # (*stack, blocks) uint8: the blocks' scales
    nested_absmax: jax.Array  # (*stack, ceil(blocks / 256)) float32: the scales' scales
    nested_offset: jax.Array  # (*stack) float32: the scales' mean

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes."""
        return self.nested_offset.shape


def encode(weight: Float[Array, "*stack out in_"], dtype: DTypeLike) -> NF4:
    """Quantise ``weight``, in float32; ``dtype`` is that of the kernel it stands for.

    Example::

        >>> leaf = encode(jnp.array([[1.0, -0.7, 0.1]]), jnp.float32)
        >>> leaf.packed  # levels 15 and 1, then 8 and a spare 7
        Array([241, 135], dtype=uint8)
    """
    *stack, rows, columns = weight.shape
    blocks, absmax = _blocks(jnp.asarray(weight, jnp.float32).reshape(*stack, -1), BLOCK)
    codes = _nearest(blocks, absmax, LEVELS)
    codes = codes.reshape(*stack, -1)[..., : rows * columns + rows * columns % 2]  # a spare one is a zero's
    offset = absmax.mean(axis=-1)
    groups, nested = _blocks(absmax - offset[..., None], GROUP)
    scales = _nearest(groups, nested, MAP).reshape(*stack, -1)[..., : absmax.shape[-1]]
    return NF4((columns, rows), jnp.dtype(dtype), codes[..., ::2] << 4 | codes[..., 1::2], scales, nested, offset)


def decode(leaf: NF4) -> Float[Array, "*stack out in_"]:
    """The weight in float32."""
    columns, rows = leaf.size
    scales = _scaled(jnp.take(MAP, leaf.absmax, mode="clip"), leaf.nested_absmax, GROUP) + leaf.nested_offset[..., None]
    codes = jnp.stack([leaf.packed >> 4, leaf.packed & 15], axis=-1).reshape(*leaf.stack, -1)[..., : rows * columns]
    return _scaled(jnp.take(LEVELS, codes, mode="clip"), scales, BLOCK).reshape(*leaf.stack, rows, columns)


def _blocks(row: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """``row`` (..., n) as blocks (..., ceil(n / length), length), the last filled with zeros, and their maxima."""
    spare = -row.shape[-1] % length
    blocks = jnp.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, spare)]).reshape(*row.shape[:-1], -1, length)
    return blocks, jnp.abs(blocks).max(axis=-1)


def _nearest(blocks: jax.Array, absmax: jax.Array, levels: np.ndarray) -> jax.Array:
    """The number of the level nearest to each number of ``blocks`` (..., length) over its ``absmax`` (...), uint8."""
    middles = (levels[:-1] + levels[1:]) / 2
    scaled = jnp.clip(blocks * (1 / jnp.maximum(absmax, TINY))[..., None], -1, 1)
    return jnp.searchsorted(middles, scaled, side="left").astype(jnp.uint8)


def _scaled(row: jax.Array, scales: jax.Array, length: int) -> jax.Array:
    """``row`` (..., n) times the scale (..., ceil(n / length)) of each one's block."""
    n = row.shape[-1]
    blocks = jnp.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, -n % length)]).reshape(*row.shape[:-1], -1, length)
    return (blocks * scales[..., None]).reshape(*row.shape[:-1], -1)[..., :n]
