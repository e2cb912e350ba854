"""Bat: MiSS whose change depends on the kernel, block by block (Kang and Yin, arXiv 2409.15371, first called Bone).

Kernel and change are cut into blocks of r x r. With b_J, one trained block for each block of outputs J, the change is
``dW_IJ = W0_IJ b_J + b_J`` of PEFT's weight (out, in), whose blocks are the transposes of ours; of full rank. b starts
at zero. PEFT's Bat (MiSS with ``init_weights="bat"``) has no scale: ``scaling: none``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.utils.errors import InputError

PAIR, READS_KERNEL = "none", False
pair = None


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_blocks`` (out / r, r, r), zero: r * out numbers, as PEFT lays them.

    Raises:
      InputError: r does not divide both sides of the kernel.
    """
    (inputs, rank), outputs = begun["lora_a"].shape, begun["lora_b"].shape[1]
    if inputs % rank or outputs % rank:
        raise InputError(f"bat cuts a kernel {(inputs, outputs)} into blocks of {rank} x {rank}: take a rank that fits")
    return {"lora_blocks": jnp.zeros((outputs // rank, rank, rank), begun["lora_a"].dtype)}


def change(adapter: Adapter, w: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """``W_IJ b_J + b_J`` in each block, of the transposed blocks of ``w``."""
    b = adapter["lora_blocks"]
    count, rank, _ = b.shape
    blocks = w.reshape(-1, rank, count, rank)  # I, input, J, output
    product = jnp.einsum("IkJo,Jki->IiJo", blocks, b)
    return (product + b.transpose(2, 0, 1)[None]).reshape(w.shape)
