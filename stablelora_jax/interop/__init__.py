"""Adapters and merged models in the formats of other programs: PEFT, vLLM, llama.cpp, Hugging Face.

Imports: utils, quantization, models, lora.
"""

from stablelora_jax.interop.peft import load_peft, save_peft

__all__ = ["load_peft", "save_peft"]
