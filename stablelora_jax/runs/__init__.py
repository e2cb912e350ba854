"""A run from its config to its directory: preparation, the loop, logs, trackers, plots.

Imports: utils, quantization, parallel, models, lora, optimizers, config, interop, data, training, evaluation.
"""
