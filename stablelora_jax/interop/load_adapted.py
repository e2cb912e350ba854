"""Load a base and an adapter as one Flax model for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.interop.export import open_source
from stablelora_jax.lora.apply import Adapted, adapted
from stablelora_jax.lora.transform import merge
from stablelora_jax.models.decoder import Decoder
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
    untie: bool = False,
    strict: bool = False,
) -> tuple[Decoder | Adapted, dict[str, Any]]:
    """Load ``base``, and ``adapter`` on it.

    Args:
      base: Hugging Face directory, GGUF file or hub id.
      adapter: a run directory of ``experiments/train.py``, an adapter in PEFT's layout, or None.
      dtype: of the model.
      merged: merge the adapter into the parameters.
      untie: give a tied head its own weights first, for an adapter that changes the head or the embedding alone.
      strict: refuse an adapter that was trained on another base, instead of a warning.

    Returns:
      ``(model, variables)`` for ``model.apply(variables, tokens)``: ``variables`` has ``"params"``, and ``"lora"``
      where an adapter is not merged.

    Raises:
      InputError: a base or an adapter that cannot be loaded, or ``merged`` without an adapter.
    """
    if merged and adapter is None:
        raise InputError("merged needs an adapter to merge")
    if adapter is None:
        model, params = load_pretrained(base, dtype=dtype)
        return model, {"params": params}
    source = open_source(adapter, str(base), dtype, untie=untie, strict=strict)
    if merged:
        return source.model, {"params": merge(source.params, source.adapters, source.spec)}
    return adapted(source.model, source.spec), {"params": source.params, "lora": source.adapters}
