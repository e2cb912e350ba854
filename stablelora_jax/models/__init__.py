"""Pretrained decoders: architecture, weights in and out, tokenizers."""
