"""The shapes that ``bench.py train`` knows by name, as the ``config.json`` of each model says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.models.shapes import KNOWN

LLAMA_15M: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,  # of the trained one 256; rotary positions have no end
    "tie_word_embeddings": True,
}
SMOLLM2_135M: Mapping[str, Any] = {  # HuggingFaceTB/SmolLM2-135M
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA_31_8B: Mapping[str, Any] = {  # meta-llama/Llama-3.1-8B
    **KNOWN["meta-llama/Llama-3.2-3B"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": 128,
    "rope_scaling": {**KNOWN["meta-llama/Llama-3.2-3B"]["rope_scaling"], "factor": 8.0},
    "tie_word_embeddings": False,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-15m": LLAMA_15M,
    "smollm2-135m": SMOLLM2_135M,
    "qwen2-0.5b": KNOWN["Qwen/Qwen2-0.5B"],
    "qwen2-1.5b": KNOWN["Qwen/Qwen2-1.5B"],
    "llama3.2-1b": KNOWN["meta-llama/Llama-3.2-1B"],
    "llama3.2-3b": KNOWN["meta-llama/Llama-3.2-3B"],
    "llama3.1-8b": LLAMA_31_8B,
}
