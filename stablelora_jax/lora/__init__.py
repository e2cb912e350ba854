"""LoRA as a transform of a parameter tree: the spec, where it puts adapters, what they compute, merging, combining.

Imports: utils, quantization. It knows nothing of :mod:`stablelora_jax.models`.
"""
