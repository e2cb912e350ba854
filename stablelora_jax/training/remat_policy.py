"""How much memory a training step needs, and the remat policy that it leaves room for.

Counted for one device, from shapes alone: the base; adapters, their gradients and AdamW's two moments; what each layer
keeps for the backward pass (``models/remat.py``), which grows with tokens and layers; and what one layer, and one tile
of logits, need while they are worked on. A test counts what is kept in the compiled residuals.
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.pairs import pairs
from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.attention import best_here
from stablelora_jax.models.block import accum_dtype
from stablelora_jax.training.cross_entropy import CHUNK_BYTES

POLICIES = ("save_dots", "no_mlp", "attention", "nothing")  # from the fastest to the smallest
SHARE = 0.9  # of a device's memory that is counted on
ADAMW = 4  # a float32 adapter, its gradient and two moments


def choose_remat(
    config: DecoderConfig,
    params: Any,
    adapters: Any,
    *,
    rows: int,
    length: int,
    dtype: DTypeLike,
    attention: str = "auto",
) -> str:
    """The first of ``POLICIES`` whose step fits into a device's memory, else the last.

    Args:
      config: the decoder's.
      params: the base where it lies, or its shapes with their shardings.
      adapters: or their shapes.
      rows: of a micro-batch, on one device.
      length: tokens of a row.
      dtype: of the activations.
      attention: the decoder's.
    """
    kind = best_here(dtype, config, length, 0) if attention == "auto" else attention
    room = SHARE * device_bytes()
    chunk = max(CHUNK_BYTES, 4 * rows * config.vocab_size)  # a token of each row at least
    fixed = _bytes(params) + ADAMW * _bytes(adapters) + 3 * chunk
    ranks = sum(pair["lora_a"].shape[-1] for pair in pairs(adapters).values())
    for policy in POLICIES:
        shape: dict[str, Any] = {"rows": rows, "length": length, "dtype": dtype, "ranks": ranks}
        step = saved_activation_bytes(config, policy, **shape, dense=kind == "xla")
        if fixed + step + working_bytes(config, rows=rows, length=length) <= room:
            return policy
    return POLICIES[-1]


def saved_activation_bytes(
    config: DecoderConfig, policy: str, *, rows: int, length: int, dtype: DTypeLike, ranks: int, dense: bool = False
) -> int:
    """Bytes that all layers together keep for the backward pass; ``ranks`` is the sum over a layer's pairs.

    ``dense``: attention keeps its probabilities (``xla``), not the statistics of flash attention.
    """
    c, wider = config, jnp.dtype(accum_dtype(dtype)).itemsize / jnp.dtype(dtype).itemsize
    heads = c.num_attention_heads
    statistics = heads * wider * (length if dense else 1)  # float32 at least
    projections = (heads + 2 * c.num_key_value_heads) * c.head_dim + c.hidden_size
    kept = {"nothing": 0.0, "attention": ranks + heads * c.head_dim + (0 if dense else statistics)}
    kept["no_mlp"] = ranks + heads * c.head_dim + statistics + projections
    kept["save_dots"] = kept["no_mlp"] + 2 * c.intermediate_size
    numbers = c.hidden_size + kept[policy]  # the stream that enters the layer is always kept
    return round(numbers * jnp.dtype(dtype).itemsize * c.num_hidden_layers * rows * length)


def working_bytes(config: DecoderConfig, *, rows: int, length: int) -> int:
    """Bytes of one layer at work, in float32: a handful of arrays of the stream and of the MLP."""
    return 4 * rows * length * (8 * config.hidden_size + 4 * config.intermediate_size)


def device_bytes() -> int:
    """Memory of a device; of a CPU, the machine's over its devices."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _bytes(tree: Any) -> int:
    """Of arrays, or of shapes; of arrays that are split, what one device holds."""

    def size(x: Any) -> int:
        split = getattr(x, "sharding", None)
        shape = split.shard_shape(x.shape) if split is not None else x.shape
        size_bytes: int = int(jnp.dtype(x.dtype).itemsize) * math.prod(shape)
        return size_bytes

    return sum(size(x) for x in jax.tree.leaves(tree))
