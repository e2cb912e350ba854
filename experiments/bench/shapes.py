"""The model shapes of ``bench.py train`` by name, with the values of each model's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.models.pretrained.shapes import KNOWN

LLAMA_15M: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,  # the trained model has 256; RoPE allows any
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


def _qwen3(hidden: int, feed_forward: int, layers: int, heads: int, tied: bool = True) -> Mapping[str, Any]:
    """Qwen/Qwen3-* (arXiv 2505.09388, table 1)."""
    sizes = {"hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    rope = {"rope_theta": 1e6, "max_position_embeddings": 40960}
    return {"model_type": "qwen3", **sizes, **rope, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied}


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-15m": LLAMA_15M,
    "smollm2-135m": SMOLLM2_135M,
    "qwen2-0.5b": KNOWN["Qwen/Qwen2-0.5B"],
    "qwen2-1.5b": KNOWN["Qwen/Qwen2-1.5B"],
    "llama3.2-1b": KNOWN["meta-llama/Llama-3.2-1B"],
    "llama3.2-3b": KNOWN["meta-llama/Llama-3.2-3B"],
    "llama3.1-8b": LLAMA_31_8B,
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
}
