"""CP: the change of a convolution's kernel in CP form, one factor for each of its axes.

Of a kernel (h, w, in, out) ``dK[a, b, c, o] = s sum_q H[a, q] W[b, q] V[c, q] U[q, o]``: a convolution of one channel
for each q between two of 1 x 1. That is a pair whose A is the column-wise Kronecker (Khatri-Rao) product of H, W and V,
of r (h + w + in + out) numbers. A kernel that contracts one axis alone has LoRA's pair. What LyCORIS calls cp is a
Tucker form, and a Keras ``CPLoRAConv2D`` that is in use mixes the r channels in between, which is none.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "none", False
READS_AXES = True
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any, axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """``lora_in_0`` (axes[0], r), ..., one for each axis that the kernel contracts, and ``lora_out`` (r, out), zero.

    They are uniform with such bounds that their product has the deviation of PEFT's A, ``1 / sqrt(3 in)``.
    """
    rank, dtype, count = begun["lora_b"].shape[0], begun["lora_b"].dtype, len(axes)
    drawn = {}
    for at, (key, size) in enumerate(zip(jax.random.split(keys.own, count), axes, strict=True)):
        bound = 3 ** ((count - 1) / (2 * count)) / size**0.5
        drawn[f"lora_in_{at}"] = jax.random.uniform(key, (size, rank), dtype, -bound, bound)
    return {**drawn, "lora_out": jnp.zeros_like(begun["lora_b"])}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A = the Khatri-Rao product of the factors (in, r), B = ``lora_out``."""
    count = sum(name.startswith("lora_in_") for name in adapter)
    factors = [adapter[f"lora_in_{at}"] for at in range(count)]
    return {"lora_a": reduce(_khatri_rao, factors), "lora_b": adapter["lora_out"]}


def _khatri_rao(x: Float[Array, "n r"], y: Float[Array, "m r"]) -> Float[Array, "n*m r"]:
    return (x[:, None] * y[None]).reshape(-1, x.shape[1])
