"""VeRA: random factors that are shared and frozen, scaled by two trained vectors (Kopiczko et al., arXiv 2310.11454).

``dW = s A diag(d) B diag(b)``, A (in, r) uniform in +-sqrt(6 / in), B (r, out) in +-sqrt(6 / r), d = 0.1 and b = 0 at
the start. The factors are drawn again from their seed, which all modules share, whenever they are needed: modules of
one size have the same, and none is stored. PEFT's draw is another, which no seed here gives: adapters of its files
carry the factors, as ``frozen_a`` and ``frozen_b``. PEFT's VeRA has no scale: ``scaling: none``.
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
    frozen_a, frozen_b = bases(adapter, size)
    return {"lora_a": frozen_a, "lora_b": d[:, None] * frozen_b * b[None]}


def bases(adapter: Adapter, size: tuple[int, ...], fan_in: int | None = None) -> tuple[jax.Array, jax.Array]:
    """A (in, r) and B (r, out) of a kernel ``size``: those that the adapter carries, or drawn from its seed.

    What is drawn for a kernel is a part of what is drawn for a larger one, but for the bound of A, which is
    ``sqrt(6 / fan_in)``, of ``in`` where that is None: so kernels of all sizes can be given parts of one pair, as in
    PEFT.
    """
    if "frozen_seed" not in adapter:
        return adapter["frozen_a"], adapter["frozen_b"]
    d = adapter["lora_lambda_d"]
    keys, (rank,) = jax.random.split(jax.random.wrap_key_data(adapter["frozen_seed"])), d.shape
    wide, thin = (6 / (fan_in or size[0])) ** 0.5, (6 / rank) ** 0.5
    a = jax.random.uniform(keys[0], (size[0], rank), d.dtype, -1, 1)
    return wide * a, thin * jax.random.uniform(keys[1], (size[1], rank), d.dtype, -1, 1).T
