"""An untied copy of a tied decoder: the head becomes a kernel of its own, which may then change apart."""

from __future__ import annotations

import dataclasses
from typing import Any

from stablelora_jax.models.decoder import Decoder


def untie(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """``(model, params)`` with ``lm_head`` (D, V), the transposed embedding; an untied model is given back as it is.

    The logits stay what they were up to rounding.
    """
    if not model.config.tie_word_embeddings:
        return model, params
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    kernel = params["model"]["embed_tokens"]["embedding"].T
    return model.clone(config=config), {**params, "lm_head": {"kernel": kernel}}
