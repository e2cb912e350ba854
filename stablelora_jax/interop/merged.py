"""Write a base with merged adapters as a Hugging Face model, which needs neither this package nor PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from stablelora_jax.lora.apply import adapted
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.transform import merge
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import load_pretrained, save_pretrained
from stablelora_jax.quantization import dequantize_tree
from stablelora_jax.utils.checked import as_dtype
from stablelora_jax.utils.errors import InputError


class MergeCheck(NamedTuple):
    """The logits of the merged model, read back from disk, against those of base and adapters, on sample tokens."""

    difference: float  # the largest absolute difference
    largest: float  # the largest absolute logit


def save_merged(
    directory: str | Path,
    model: Decoder,
    params: Mapping[str, Any],
    adapters: Mapping[str, Any],
    spec: LoraSpec,
    *,
    dtype: DTypeLike | None = None,
) -> MergeCheck:
    """Write base and adapters as one Hugging Face model: config, sharded safetensors with index, tokenizer.

    Kernels are merged in ``dtype`` or the dtype of ``params``, whichever is wider, and rounded once. The written model
    is tied where ``model`` is: an adapter of the embedding then changes the head, too.

    Args:
      directory: made if needed.
      model: the base.
      params: of the base; quantised kernels are dequantised, as they were for training.
      adapters: as made by ``init_adapters`` for ``spec``.
      spec: the spec of the adapters.
      dtype: of the written weights, floating; default: that of ``model``.

    Returns:
      The comparison, made with the model as it was read back from ``directory``.

    Raises:
      InputError: adapters that do not fit the model, a bad ``dtype``, or logits that are not finite.
    """
    dtype, params = as_dtype(model.dtype if dtype is None else dtype), dequantize_tree(params)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype must be floating, such as float32 or bfloat16, not {dtype}")
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, dtype)), params)
    merged = jax.tree.map(lambda leaf: leaf.astype(dtype), merge(wide, adapters, spec))
    save_pretrained(directory, model.clone(dtype=dtype), merged)
    del wide, merged
    tokens = _sample(model)
    expected = adapted(model, spec).apply({"params": params, "lora": adapters}, tokens)
    again, loaded = load_pretrained(directory, dtype=model.dtype)
    logits = again.apply({"params": loaded}, tokens)
    check = MergeCheck(float(jnp.abs(logits - expected).max()), float(jnp.abs(expected).max()))
    if not np.isfinite(check.difference):
        raise InputError(f"{directory}: the merged model gives NaN or infinity; try dtype float32")
    return check


def _sample(model: Decoder) -> jax.Array:
    """Fixed random tokens (2, T); T is 32, or the model's longest sequence if that is shorter."""
    length = min(32, model.config.max_position_embeddings)
    rows = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, length))
    return jnp.asarray(rows, jnp.int32)
