"""Formats of other programs."""

from stablelora_jax.interop.peft import load_peft, save_peft

__all__ = ["load_peft", "save_peft"]
