"""IntTune: N (r, r) alone is trained, between the factors of SLoRA, ``dW = s A (N - N0) B`` (arXiv 2502.14482).

A, B and N0 are what the initialisation makes, and frozen: ``nystrom`` is the paper's. With another, which has no
matrix between its factors, N0 is zero, and this is LoRA-XS without its noise. The paper's code leaves ``s A N0 B`` in
the function; here it stays subtracted, and step 0 is the base.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "frozen", False
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_n`` (r, r), r^2 numbers, and the frozen factors."""
    a, b = begun["lora_a"], begun["lora_b"]
    n = begun["lora_n"] if "lora_n" in begun else jnp.zeros((a.shape[1], a.shape[1]), a.dtype)
    return {"lora_n": n, "frozen_a": a, "frozen_b": b, "frozen_n": n}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A as it is, so that no gradient of its size is formed, and (N - N0) B for B."""
    moved = adapter["lora_n"] - adapter["frozen_n"]
    return {"lora_a": adapter["frozen_a"], "lora_b": jnp.matmul(moved, adapter["frozen_b"])}
