"""Decoders as Flax Linen modules: architecture, attention, cache, pretrained weights, tokenizers.

Imports: utils, quantization. They know nothing of :mod:`stablelora_jax.lora`.
"""
