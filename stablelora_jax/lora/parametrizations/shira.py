"""SHiRA: a few entries of the kernel are trained, chosen once at random (Bhardwaj et al., arXiv 2406.13175).

``dW[i, j] = s v_k`` for ``r (in + out)`` positions (i, j), drawn uniformly without replacement as PEFT's default mask
draws them: as many numbers as LoRA of rank r trains, and a change of high rank. v starts at zero. PEFT's SHiRA has no
scale while it trains: ``scaling: none``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.lora.parametrizations.select import drawn_of_many
from stablelora_jax.utils.errors import InputError

PAIR, READS_KERNEL = "none", False
pair = None


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_values`` (n,), zero, and ``frozen_index`` (n,): their places in the flat kernel, n = r (in + out).

    Raises:
      InputError: the kernel has fewer entries, or more than int32 can number.
    """
    (inputs, rank), outputs = begun["lora_a"].shape, begun["lora_b"].shape[1]
    count, size = rank * (inputs + outputs), inputs * outputs
    if count > size:
        raise InputError(f"rank {rank} trains {count} entries of a kernel {(inputs, outputs)}: lower the rank")
    if size >= 2**31:
        raise InputError(f"a kernel {(inputs, outputs)} has more entries than shira can number: leave it out")
    values = jnp.zeros(count, begun["lora_a"].dtype)
    return {"lora_values": values, "frozen_index": drawn_of_many(keys.own, size, count)}


def change(adapter: Adapter, w: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """The values at their places, zero elsewhere."""
    values, index = adapter["lora_values"], adapter["frozen_index"]
    return jnp.zeros(w.size, values.dtype).at[index].add(values, unique_indices=True).reshape(w.shape)
