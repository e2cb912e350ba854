"""LoRA-C: the block form of a convolution's kernel (Ding et al., arXiv 2410.16954, and loralib's ``Conv2d``).

Of PyTorch's kernel (out, in, k, k) ``dK = s reshape(B A)``, with A (r k, in k) and B (out k, r k): the in k k numbers
of an output are cut into k blocks, each a combination of the rows of A. The rank of the change is up to r k^2, of which
it is a pair with a block-diagonal A; the numbers are r k^2 (in + out). Where k is 1 it is LoRA. A pair of plain
``lora`` is the other usual form, a convolution to r channels and one of 1 x 1 (PEFT's ``Conv2d``, LoCon).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.utils.errors import InputError

PAIR, READS_KERNEL = "none", False
READS_AXES = True
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any, axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """``lora_down`` = A (r k, in k), U(-1/sqrt(in k), 1/sqrt(in k)), and ``lora_up`` = B (out k, r k), zero.

    Raises:
      InputError: the kernel is neither one of a matrix product nor (k, k, in, out).
    """
    rank, outputs = begun["lora_b"].shape
    side, dtype = (axes[0] if len(axes) == 3 else 1), begun["lora_b"].dtype
    if axes[:-1] not in ((), (side, side)):
        raise InputError(f"lora_c is for kernels (k, k, in, out), not for one that contracts {axes}: leave it out")
    inputs = axes[-1] * side
    down = jax.random.uniform(keys.own, (rank * side, inputs), dtype, -(inputs**-0.5), inputs**-0.5)
    return {"lora_down": down, "lora_up": jnp.zeros((outputs * side, rank * side), dtype)}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A block-diagonal (in k k, r k k), its rows in the order of the kernel (k, k, in), and B (r k k, out)."""
    down, up = adapter["lora_down"], adapter["lora_up"]
    wide, inputs = down.shape  # r k, in k
    side = size[0] // inputs
    blocks = jnp.kron(jnp.eye(side, dtype=down.dtype), down.T)  # rows in PyTorch's order (in, k, k)
    a = blocks.reshape(inputs // side, side, side, side * wide).transpose(1, 2, 0, 3).reshape(size[0], -1)
    return {"lora_a": a, "lora_b": up.reshape(-1, side * wide).T}
