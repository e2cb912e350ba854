"""AdaLoRA's form: a pair with a trained singular value a rank, ``dW = s A diag(e) B`` (Zhang et al., arXiv 2303.10512).

With e = 0 at the start step 0 is the base model, whatever A and B are: neither may be zero, or nothing would learn. The
paper's A and B are normal; its penalty keeps them near orthogonal, and its schedule prunes entries of e: both are in
:mod:`stablelora_jax.rank_allocation.adalora`.
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
    """The pair, and ``lora_e`` (r,), zero: r (in + out + 1) numbers. Nothing has to stay subtracted."""
    a, b = begun["lora_a"], begun["lora_b"]
    return {"lora_a": a, "lora_b": b, "lora_e": jnp.zeros(a.shape[1], a.dtype)}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A as it is and diag(e) B for B."""
    return {"lora_a": adapter["lora_a"], "lora_b": adapter["lora_e"][:, None] * adapter["lora_b"]}
