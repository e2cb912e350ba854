"""SLoRA: a small trained matrix between the factors, ``dW = s A N B``, N (r, r) (Guo et al., arXiv 2502.14482).

The pair starts as the initialisation makes it, N as PEFT's default of a factor: U(-1/sqrt(r), 1/sqrt(r)). With
``init: nystrom``, which makes N too, it is the paper's NLoRA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "trained", False
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """The pair, and ``lora_n`` (r, r): r (in + out) + r^2 numbers; as it begins, where its product stays subtracted."""
    rank, dtype = begun["lora_a"].shape[1], begun["lora_a"].dtype
    n = begun.get("lora_n")
    if n is None:
        n = jax.random.uniform(jax.random.fold_in(keys.own, 1), (rank, rank), dtype, -(rank**-0.5), rank**-0.5)
    kept = {"frozen_b": jnp.matmul(n, begun["frozen_b"])} if "frozen_b" in begun else {}
    return {**begun, "lora_n": n, **kept}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A as it is and N B for B."""
    rest = {name: leaf for name, leaf in adapter.items() if name != "lora_n"}
    return lora.pair({**rest, "lora_b": jnp.matmul(adapter["lora_n"], adapter["lora_b"])}, size)
