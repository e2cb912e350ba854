"""The training step: loss in chunks, optimizer update, metrics, memory, checkpoints.

Imports: utils, parallel, models, lora, optimizers, data.
"""
