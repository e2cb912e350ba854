"""An untied copy of a tied decoder: the head becomes a separate kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from stablelora_jax.models.decoder import Decoder
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import get_in


@checked
def untie(model: Decoder, params: Mapping[str, Any]) -> tuple[Decoder, Any]:
    """``(model, params)`` with ``lm_head`` (D, V), the transposed embedding; an untied model is returned unchanged.

    The logits stay the same up to rounding.

    Raises:
      InputError: ``params`` hold no embedding.
    """
    if not model.config.tie_word_embeddings:
        return model, params
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    embedding: Any = get_in(params, ("model", "embed_tokens", "embedding"))
    if not hasattr(embedding, "shape"):
        raise InputError("untie: the parameters hold no model.embed_tokens.embedding: give those of the model")
    kernel = embedding.T
    return model.clone(config=config), {**params, "lm_head": {"kernel": kernel}}
