"""VB-LoRA: pairs are composed of vectors from one bank that all modules share (Li et al., arXiv 2405.15179).

Each column of A and each row of B is cut into sub-vectors of ``length`` numbers, and each sub-vector is a sum of
``topk`` vectors of the bank (vectors, length), weighted by the softmax of their logits. The bank starts as U(-0.02,
0.02), the logits as N(0, 0.1^2), as PEFT's: step 0 is *not* the base, but near it. PEFT's VB-LoRA has no scale:
``scaling: none``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import SHARED, Adapter, Keys
from stablelora_jax.utils.errors import InputError

PAIR, READS_KERNEL = "none", False
OPTIONS = {"vectors": 256, "length": 256, "topk": 2}
gain, delta, merge = lora.gain, lora.delta, lora.merge

BANK_BOUND, LOGITS_DEVIATION = 0.02, 0.1


def start(keys: Keys, w: Any, begun: Adapter, scale: Any, vectors: int, length: int, topk: int) -> dict[str, jax.Array]:
    """``lora_logits_a`` (r, in / length, vectors) and ``lora_logits_b`` (r, out / length, vectors).

    Raises:
      InputError: a side of the kernel that cannot be cut into sub-vectors, or more of the bank chosen than there is.
    """
    if topk > vectors:
        raise InputError(f"topk {topk} is more than the {vectors} vectors of the bank: lower it")
    (inputs, rank), outputs = begun["lora_a"].shape, begun["lora_b"].shape[1]
    if inputs % length or outputs % length:
        raise InputError(f"options: length {length} does not divide both sides of a kernel {(inputs, outputs)}")
    keys_of = dict(zip("ab", jax.random.split(keys.own), strict=True))
    shapes = {"a": (rank, inputs // length, vectors), "b": (rank, outputs // length, vectors)}
    dtype = begun["lora_a"].dtype
    return {f"lora_logits_{s}": LOGITS_DEVIATION * jax.random.normal(keys_of[s], shapes[s], dtype) for s in "ab"}


def share(key: jax.Array, adapters: Any, places: Any, dtype: Any, vectors: int, length: int, topk: int) -> Any:
    """``lora_bank`` (vectors, length), one for all modules."""
    bank = jax.random.uniform(key, (vectors, length), dtype, -BANK_BOUND, BANK_BOUND)
    return {**adapters, SHARED: {"lora_bank": bank}}


def pair(adapter: Adapter, size: tuple[int, ...], vectors: int, length: int, topk: int) -> dict[str, jax.Array]:
    """A (in, r) and B (r, out), composed of the bank's vectors."""
    bank = adapter["lora_bank"]
    a, b = (_composed(adapter[f"lora_logits_{side}"], bank, topk) for side in "ab")
    return {"lora_a": a.T, "lora_b": b}


def _composed(logits: Float[Array, "r n h"], bank: Float[Array, "h length"], topk: int) -> Float[Array, "r size"]:
    """Each row's sub-vectors, one after another."""
    chosen, index = jax.lax.top_k(logits, topk)
    weights = jax.nn.softmax(chosen, axis=-1)
    return jnp.einsum("rnk,rnkl->rnl", weights, jnp.take(bank, index, axis=0)).reshape(logits.shape[0], -1)
