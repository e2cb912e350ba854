"""SBoRA-FA: A selects r inputs, B is trained: ``dW[I, :] = s B`` (Zhong et al., arXiv 2407.05413).

The rows of A are standard basis vectors, drawn once without replacement; only the weights of those r inputs change. The
trained factor starts at zero, and gets a gradient from the first step.
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
    """``lora_rows`` (r, out), zero, and which inputs they are of: r * out numbers."""
    rows = jnp.zeros_like(begun["lora_b"])
    return {"lora_rows": rows, "frozen_index": drawn(keys.own, w.shape[0], rows.shape[0])}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A = the selector (in, r), B = the trained rows (r, out)."""
    rows = adapter["lora_rows"]
    return {"lora_a": selector(adapter["frozen_index"], size[0], rows.dtype), "lora_b": rows}
