"""PaCA: the weights of r random inputs are themselves trained, ``W[I, :] = s P`` (Woo et al., arXiv 2503.01905).

P (r, out) starts as ``W0[I, :] / s``. The change of the kernel is ``s (P - P0)`` in those rows, so that what a backward
pass needs of x are its r selected features alone, as with the paper's own kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.lora.parametrizations.select import drawn, selector

PAIR, READS_KERNEL = "none", True
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: jax.Array, begun: Adapter, scale: jax.Array) -> dict[str, jax.Array]:
    """``lora_rows`` (r, out) from the kernel, as they begin, and which inputs they are of: r * out numbers."""
    dtype, rank = begun["lora_b"].dtype, begun["lora_b"].shape[0]
    index = drawn(keys.own, w.shape[0], rank)
    rows = w[index].astype(dtype) / jnp.asarray(scale, dtype)
    return {"lora_rows": rows, "frozen_rows": rows, "frozen_index": index}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A = the selector (in, r), B = the change of the rows (r, out)."""
    rows = adapter["lora_rows"] - adapter["frozen_rows"]
    return {"lora_a": selector(adapter["frozen_index"], size[0], rows.dtype), "lora_b": rows}
