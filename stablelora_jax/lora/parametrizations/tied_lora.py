"""Tied-LoRA: one pair for all modules of a kind, scaled in each by vectors of its own (arXiv 2311.09578, TL6).

``dW = s A diag(u) B diag(v)``: A (in, r) and B (r, out) are trained and shared by the modules of one kind, such as all
``q_proj``, over the layers; u (r,) and v (out,) are trained in each module. At the start u = 1 and v = 0, so that step
0 is the base; A and B are U(-1/sqrt(in), 1/sqrt(in)) and U(-1/sqrt(r), 1/sqrt(r)), LoRA's default for a factor. The
paper ties a fused projection of queries, keys and values; here these are three kinds.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import SHARED, Adapter, Keys, Place
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

PAIR, READS_KERNEL = "none", False
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_u`` (r,), ones, and ``lora_v`` (out,), zeros: r + out numbers."""
    dtype = begun["lora_a"].dtype
    return {"lora_u": jnp.ones(begun["lora_a"].shape[1], dtype), "lora_v": jnp.zeros(w.shape[1], dtype)}


def share(key: jax.Array, adapters: Any, places: Mapping[Path, Place], dtype: Any) -> Any:
    """``lora_a`` (in, r) and ``lora_b`` (r, out) of each kind: r (in + out) numbers.

    Raises:
      InputError: modules of one kind with kernels or ranks of different sizes.
    """
    shared: dict[str, Any] = {}
    first: dict[Path, Place] = {}
    for place in places.values():
        known = first.setdefault(place.kind, place)
        (inputs, outputs), rank = place.size, max(place.ranks)
        if (known.size, max(known.ranks)) != (place.size, rank):
            raise InputError(
                f"tied_lora: {known.names[0]} {known.size} of rank {max(known.ranks)} and {place.names[0]} "
                f"{place.size} of rank {rank} cannot share a pair: exclude one of them"
            )
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(".".join(place.kind).encode())))
        pair = {
            "lora_a": jax.random.uniform(keys[0], (inputs, rank), dtype, -(inputs**-0.5), inputs**-0.5),
            "lora_b": jax.random.uniform(keys[1], (rank, outputs), dtype, -(rank**-0.5), rank**-0.5),
        }
        shared = tree.set_in(shared, place.kind, pair)
    return {**adapters, SHARED: shared}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A as it is, and diag(u) B diag(v) for B."""
    u, v = adapter["lora_u"], adapter["lora_v"]
    return {"lora_a": adapter["lora_a"], "lora_b": u[:, None] * adapter["lora_b"] * v[None]}
