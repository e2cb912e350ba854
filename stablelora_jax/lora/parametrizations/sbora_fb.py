"""SBoRA-FB: B selects r outputs, A is trained: ``dW[:, J] = s A`` (Zhong et al., arXiv 2407.05413).

The columns of B are standard basis vectors, drawn once without replacement; only those r outputs change. A starts at
zero, and gets a gradient from the first step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.lora.parametrizations.select import drawn, selector

PAIR, READS_KERNEL = "none", False
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_columns`` (in, r), zero, and which outputs they are of: r * in numbers."""
    columns = jnp.zeros_like(begun["lora_a"])
    return {"lora_columns": columns, "frozen_index": drawn(keys.own, w.shape[1], columns.shape[1])}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A = the trained columns (in, r), B = the selector (r, out)."""
    columns = adapter["lora_columns"]
    return {"lora_a": columns, "lora_b": selector(adapter["frozen_index"], size[1], columns.dtype).T}
