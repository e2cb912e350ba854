"""RandLoRA: a sum of random terms of rank r that together have full rank (Albert et al., arXiv 2502.00987).

With p the smaller and q the larger of (in, out) and n = ceil(p / r)::

    dW = s sum_i  Q_i diag(l_i) P diag(g_i)      Q_i (q, r), P (r, p) random and frozen; l_i (r,), g_i (p,) trained

or, where in <= out, its transpose, so that the side that is scaled is the smaller one. l starts at 0, g at 1 / max(n,
p). The bases are uniform of unit standard deviation, drawn again from their seed, which all modules share, whenever
they are needed. PEFT has no sqrt(n) in the scale, nor has this; adapters of its files carry their bases, as
``frozen_wide`` and ``frozen_thin``. A smaller r means *more* trained numbers.
"""

from __future__ import annotations

from functools import partial
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
    """All terms side by side: a pair of rank r n, of whose factors one is frozen."""
    lam, gamma = adapter["lora_lambda"], adapter["lora_gamma"]
    wide, thin = bases(adapter, size)
    scaled = (lam[:, :, None] * thin[:, None, :] * gamma[None]).reshape(lam.size, -1)  # (r n, p)
    return {"lora_a": wide, "lora_b": scaled} if size[0] > size[1] else {"lora_a": scaled.T, "lora_b": wide.T}


def bases(adapter: Adapter, size: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Q (q, r n), its columns (rank, term), and P (r, p): those that the adapter carries, or drawn from its seed.

    Uniform of unit standard deviation, rounded to bfloat16, in which PEFT holds them. Column by column, so that what is
    drawn for a kernel is a part of what is drawn for a larger one.
    """
    if "frozen_seed" not in adapter:
        return adapter["frozen_wide"], adapter["frozen_thin"]
    lam, bound = adapter["lora_lambda"], 3**0.5
    keys = jax.random.split(jax.random.wrap_key_data(adapter["frozen_seed"]))
    drawn: Any = partial(jax.random.uniform, dtype=lam.dtype, minval=-bound, maxval=bound)
    wide = jax.vmap(lambda i: drawn(jax.random.fold_in(keys[0], i), (max(size),)), out_axes=1)(jnp.arange(lam.size))
    thin = drawn(keys[1], (min(size), lam.shape[0])).T
    return _rounded(wide), _rounded(thin)


def _rounded(x: jax.Array) -> jax.Array:
    """To bfloat16, by an operation that no compiler leaves out."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
