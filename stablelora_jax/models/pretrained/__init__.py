"""Weights and tokenizers in and out: safetensors, GGUF, bitsandbytes."""
