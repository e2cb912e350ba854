"""A run from its config to its directory: preparation, the loop, logs, trackers, plots.

Imports: utils, quantization, parallel, models, lora, optimizers, rank_allocation, config, interop, data,
training, evaluation.
"""
