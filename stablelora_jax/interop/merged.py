"""Adapters folded into their base, as a Hugging Face model that needs neither this package nor PEFT."""

from __future__ import annotations

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
from stablelora_jax.utils.errors import InputError


class MergeCheck(NamedTuple):
    """How far the merged model, read back from disk, is from base and adapters, on a sample of tokens."""

    difference: float  # the largest between two logits
    largest: float  # the largest logit


def save_merged(
    directory: str | Path, model: Decoder, params: Any, adapters: Any, spec: LoraSpec, *, dtype: DTypeLike | None = None
) -> MergeCheck:
    """Write base and adapters as one Hugging Face model: config, sharded safetensors with index, tokenizer.

    Kernels are merged at least in float32 and rounded once, to ``dtype``. Where the head is tied to the embedding, what
    changes one changes the other, before and after: the written model is tied as ``model`` is.

    Args:
      directory: made if needed.
      model: the base.
      params: of the base; quantised kernels are dequantised, since that is what the adapters were trained on.
      adapters: as made for ``spec``; of any parametrisation that has an exact merge.
      spec: the spec of the adapters.
      dtype: of the written weights; that of ``params`` by default.

    Returns:
      The comparison, made with the model as it was read back from ``directory``.

    Raises:
      InputError: adapters that do not fit, or a merged kernel that is not finite.
    """
    dtype, params = jnp.dtype(model.dtype if dtype is None else dtype), dequantize_tree(params)
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
    """Two rows of tokens (2, 32), the same at each call."""
    length = min(32, model.config.max_position_embeddings)
    rows = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, length))
    return jnp.asarray(rows, jnp.int32)
