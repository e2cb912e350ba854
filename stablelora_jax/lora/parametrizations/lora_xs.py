"""LoRA-XS: both factors are frozen, and R (r, r) between them is trained: ``dW = s A R B`` (arXiv 2405.17604).

A and B are what the initialisation makes: ``svd`` is the paper's. R starts as N(0, 1e-5^2), as there, so that step 0
is the base model but for that noise; or as an initialisation that makes R, too, says.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "frozen", False
gain, delta, merge = lora.gain, lora.delta, lora.merge

NOISE = 1e-5


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_r`` (r, r), r^2 numbers, and the frozen factors."""
    a, b = begun["lora_a"], begun["lora_b"]
    rank = a.shape[1]
    noise = NOISE * jax.random.normal(jax.random.fold_in(keys.own, 1), (rank, rank), a.dtype)
    return {"lora_r": begun.get("lora_r", noise), "frozen_a": a, "frozen_b": b}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A as it is, so that no gradient of its size is formed, and R B for B."""
    return {"lora_a": adapter["frozen_a"], "lora_b": jnp.matmul(adapter["lora_r"], adapter["frozen_b"])}
