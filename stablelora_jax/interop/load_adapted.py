"""A base and the adapter that belongs to it, for everything that only reads a model: ``(model, variables)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.interop.export import open_source
from stablelora_jax.lora.apply import adapted
from stablelora_jax.lora.transform import merge
from stablelora_jax.models.pretrained.load import load_pretrained
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError


@checked
def load_adapted_model(
    base: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    merged: bool = False,
    apart: bool = False,
    strict: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Load ``base``, and ``adapter`` on it.

    Args:
      base: Hugging Face directory, GGUF file or hub id.
      adapter: a run directory of ``experiments/train.py``, an adapter in PEFT's layout, or None.
      dtype: of the model.
      merged: fold the adapter into the parameters.
      apart: give a tied head its own weights first, for an adapter that changes it or the embedding alone.
      strict: refuse an adapter that was made on another base, of which there is a warning otherwise.

    Returns:
      ``(model, {"params": ...})``, with ``"lora"`` where the adapter is not merged.

    Raises:
      InputError: what cannot be loaded, or ``merged`` without an adapter.
    """
    if merged and adapter is None:
        raise InputError("merged needs an adapter to merge")
    if adapter is None:
        model, params = load_pretrained(base, dtype=dtype)
        return model, {"params": params}
    source = open_source(adapter, str(base), dtype, apart=apart, strict=strict)
    if merged:
        return source.model, {"params": merge(source.params, source.adapters, source.spec)}
    return adapted(source.model, source.spec), {"params": source.params, "lora": source.adapters}
