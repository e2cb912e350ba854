"""MiSS: every shard of r inputs shares one trained D (r, out), ``dW = s S D`` (Kang and Yin, arXiv 2409.15371).

S (in, r) is fixed: ``S[i, j] = 1`` where ``i mod r == j``; so x S sums the shards of x. That is LoRA with this S for A
and D for B. D starts at zero. PEFT's MiSS has no scale: ``scaling: none``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "none", False
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_d`` (r, out), zero: r * out numbers."""
    return {"lora_d": jnp.zeros_like(begun["lora_b"])}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A = S (in, r), B = D (r, out)."""
    d = adapter["lora_d"]
    inputs, rank = size[0], d.shape[0]
    shards = jnp.arange(inputs)[:, None] % rank == jnp.arange(rank)[None]
    return {"lora_a": shards.astype(d.dtype), "lora_b": d}
