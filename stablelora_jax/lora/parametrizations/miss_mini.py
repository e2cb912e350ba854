"""MiSS-mini: as :mod:`.miss`, whose D (r, out) is a smaller one side by side (Kang and Yin, arXiv 2409.15371).

``D = [E, E, ...]`` with one trained E (r, ``mini_r``). PEFT's ``MissConfig(init_weights="mini")`` has no scale:
``scaling: none``. With ``mini_r`` as large as the outputs it is MiSS.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora, miss
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.utils.errors import InputError

PAIR, READS_KERNEL = "none", False
OPTIONS = {"mini_r": 1}
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any, mini_r: int) -> dict[str, jax.Array]:
    """``lora_d`` (r, mini_r), zero: r * mini_r numbers.

    Raises:
      InputError: ``mini_r`` does not divide the outputs.
    """
    if w.shape[1] % mini_r:
        raise InputError(f"options: mini_r {mini_r} does not divide the {w.shape[1]} outputs of the kernel")
    return {"lora_d": jnp.zeros((begun["lora_b"].shape[0], mini_r), begun["lora_b"].dtype)}


def pair(adapter: Adapter, size: tuple[int, ...], mini_r: int) -> dict[str, jax.Array]:
    """MiSS's, of the repeated matrix."""
    return miss.pair({"lora_d": jnp.tile(adapter["lora_d"], (1, size[1] // mini_r))}, size)
