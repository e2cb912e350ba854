"""Decoding with a key-value cache, sampling, and many adapters in one batch.

Imports: utils, models, lora, data.
"""
