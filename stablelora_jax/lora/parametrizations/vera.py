"""VeRA: random factors that are shared and frozen, scaled by two trained vectors (Kopiczko et al., arXiv 2310.11454).

``dW = s A diag(d) B diag(b)``, A (in, r) uniform in +-sqrt(6 / in), B (r, out) in +-sqrt(6 / r), d = 0.1 and b = 0 at
the start. The factors are drawn again from their seed, which all modules share, whenever they are needed: modules of
one size have the same, and none is stored. PEFT cuts those of all sizes from one draw of its own, which no seed here
gives: adapters of its files carry them, as ``frozen_a`` and ``frozen_b``. PEFT's VeRA has no scale: ``scaling: none``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "none", False
gain, delta, merge = lora.gain, lora.delta, lora.merge

D_INITIAL = 0.1


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_lambda_d`` (r,), ``lora_lambda_b`` (out,), r + out numbers, and the seed."""
    rank, dtype = begun["lora_a"].shape[1], begun["lora_a"].dtype
    trained = {"lora_lambda_d": jnp.full(rank, D_INITIAL, dtype), "lora_lambda_b": jnp.zeros(w.shape[1], dtype)}
    return {**trained, "frozen_seed": jax.random.key_data(keys.shared)}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A as it is, so that no gradient of its size is formed, and diag(d) B diag(b) for B."""
    d, b = adapter["lora_lambda_d"], adapter["lora_lambda_b"]
    if "frozen_seed" in adapter:
        frozen_a, frozen_b = _bases(adapter["frozen_seed"], size, d.shape[0], d.dtype)
    else:
        frozen_a, frozen_b = adapter["frozen_a"], adapter["frozen_b"]
    return {"lora_a": frozen_a, "lora_b": d[:, None] * frozen_b * b[None]}


def _bases(seed: jax.Array, size: tuple[int, ...], rank: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.wrap_key_data(seed))
    wide, thin = (6 / size[0]) ** 0.5, (6 / rank) ** 0.5
    a = jax.random.uniform(keys[0], (size[0], rank), dtype, -wide, wide)
    return a, jax.random.uniform(keys[1], (rank, size[1]), dtype, -thin, thin)
