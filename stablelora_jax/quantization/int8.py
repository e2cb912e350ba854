"""int8 by rows (LLM.int8(), arXiv 2208.07339, section 2): each output has the scale of its largest weight.

::

    w ~ (c / 127) a        c = round(127 w / a), a = max |w| over a row of the weight (out, in)

8 + 32 / in bits a number. Codes and scales are those of bitsandbytes' ``int8_vectorwise_quant`` without outliers
(``weight`` and ``SCB`` in its files); a row of zeros, undefined there, decodes to zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stablelora_jax.quantization.leaf import Quantized

STEP = np.float32(1 / 127)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(Quantized):
    """A kernel in one byte a number and four an output."""

    codes: jax.Array  # (*stack, out, in) int8, -127 .. 127
    absmax: jax.Array  # (*stack, out) float32

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes."""
        return self.codes.shape[:-2]


def encode(weight: Float[Array, "*stack out in_"], dtype: DTypeLike) -> Int8:
    """Quantise ``weight``, in float32; ``dtype`` is that of the kernel it stands for.

    Example::

        >>> encode(jnp.array([[1.0, -0.5, 0.0]]), jnp.float32).codes
        Array([[127, -64,   0]], dtype=int8)
    """
    weight = jnp.asarray(weight, jnp.float32)
    absmax = jnp.abs(weight).max(axis=-1)
    codes = jnp.round(weight * (127 / jnp.where(absmax > 0, absmax, 1))[..., None])
    return Int8((weight.shape[-1], weight.shape[-2]), jnp.dtype(dtype), codes.astype(jnp.int8), absmax)


def decode(leaf: Int8) -> Float[Array, "*stack out in_"]:
    """The weight in float32."""
    return leaf.codes.astype(jnp.float32) * STEP * leaf.absmax[..., None]
