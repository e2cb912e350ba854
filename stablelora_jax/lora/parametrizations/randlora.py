"""RandLoRA: a sum of random terms of rank r that together have full rank (Albert et al., arXiv 2502.00987).

With p the smaller and q the larger of (in, out) and n = ceil(p / r)::

    dW = s sum_i  Q_i diag(l_i) P diag(g_i)      Q_i (q, r), P (r, p) random and frozen; l_i (r,), g_i (p,) trained

or, where in <= out, its transpose, so that the side that is scaled is the smaller one. l starts at 0, g at 1 / max(n,
p). The bases are uniform of unit standard deviation, drawn again from their seed, which all modules share, whenever
they are needed. PEFT has no sqrt(n) in the scale, nor has this; its files carry their own bases. A smaller r means
*more* trained numbers.
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
    """``lora_lambda`` (r, n), ``lora_gamma`` (n, p), n (r + p) numbers, and the seed."""
    rank, dtype = begun["lora_a"].shape[1], begun["lora_a"].dtype
    small = min(w.shape)
    terms = -(-small // rank)
    trained = {
        "lora_lambda": jnp.zeros((rank, terms), dtype),
        "lora_gamma": jnp.full((terms, small), 1 / max(terms, small), dtype),
    }
    return {**trained, "frozen_seed": jax.random.key_data(keys.shared)}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """All terms side by side: a pair of rank n r, of whose factors one is frozen."""
    lam, gamma = adapter["lora_lambda"], adapter["lora_gamma"]
    rank, terms = lam.shape
    if "frozen_seed" in adapter:
        wide, thin = _bases(adapter["frozen_seed"], max(size), min(size), terms, rank, lam.dtype)
    else:
        wide, thin = adapter["frozen_wide"], adapter["frozen_thin"]
    scaled = (lam.T[:, :, None] * thin[None] * gamma[:, None, :]).reshape(terms * rank, -1)  # (n r, p)
    wide = wide.reshape(-1, terms * rank)  # (q, n r)
    if size[0] > size[1]:
        return {"lora_a": wide, "lora_b": scaled}
    return {"lora_a": scaled.T, "lora_b": wide.T}


def _bases(seed: jax.Array, q: int, p: int, terms: int, rank: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    keys, bound = jax.random.split(jax.random.wrap_key_data(seed)), 3**0.5
    wide = jax.random.uniform(keys[0], (q, terms, rank), dtype, -bound, bound)
    return wide, jax.random.uniform(keys[1], (rank, p), dtype, -bound, bound)
