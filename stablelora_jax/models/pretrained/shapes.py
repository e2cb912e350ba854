"""Architectures without weights: from a ``config.json``, or of the paper's four models from here.

:data:`KNOWN` holds what their ``config.json`` say, so that a run can be traced and compiled where there is no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stablelora_jax.models.architecture import DecoderConfig, decoder_config
from stablelora_jax.models.pretrained.load import base_directory
from stablelora_jax.utils.errors import InputError, brief, named
from stablelora_jax.utils.files import as_path


def _qwen2(hidden: int, layers: int, heads: int, feed_forward: int) -> dict[str, Any]:
    """Qwen/Qwen2-*, base models (arXiv 2407.10671, table 1)."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": feed_forward, "num_key_value_heads": 2, "vocab_size": 151936}
    rope = {"rope_theta": 1e6, "max_position_embeddings": 131072}
    ends = {"bos_token_id": 151643, "eos_token_id": 151643}
    return {"model_type": "qwen2", **sizes, **rope, **ends, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}


def _llama32(hidden: int, layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    """meta-llama/Llama-3.2-*, base models."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim}
    sizes |= {"intermediate_size": 8192, "num_key_value_heads": 8, "vocab_size": 128256}
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    rope = {"rope_theta": 500000.0, "rope_scaling": scaling, "max_position_embeddings": 131072}
    ends = {"bos_token_id": 128000, "eos_token_id": 128001}
    return {"model_type": "llama", **sizes, **rope, **ends, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2-0.5B": _qwen2(896, 24, 14, 4864),
    "Qwen/Qwen2-1.5B": _qwen2(1536, 28, 12, 8960),
    "meta-llama/Llama-3.2-1B": _llama32(2048, 16, 32, 64),
    "meta-llama/Llama-3.2-3B": _llama32(3072, 28, 24, 128),
}


def architecture(path_or_id: str | None) -> DecoderConfig:
    """The architecture of a model directory, a GGUF file, a name in :data:`KNOWN` or a hub id; None: the own base.

    Raises:
      InputError: there is no ``config.json`` to be had, or the decoder is not such a model.
    """
    name = path_or_id or str(base_directory())
    directory = as_path(name, "the model")
    if name in KNOWN and not directory.is_dir():
        return decoder_config(KNOWN[name], name)
    if directory.is_file():
        if directory.suffix != ".gguf":
            raise InputError(f"{directory} is a file but not a .gguf; give the directory that holds config.json")
        from stablelora_jax.models.pretrained.gguf import read_gguf

        return decoder_config(read_gguf(directory).config, str(directory))
    file = directory / "config.json" if directory.is_dir() else _from_hub(name)
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for, a device read without an end
            raise OSError("it is no regular file")
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {brief(error)}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file} must hold a JSON object, not {type(raw).__name__}")
    return decoder_config(raw, str(file))


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # many kinds: no such name, offline, gated
        reason = named(error)
        raise InputError(f"{name} is no model directory, and the hub gave no config.json ({reason})") from None
