"""Several adapters that are trained side by side on one frozen base, in one compiled step.

Imports: utils, parallel, lora, optimizers, config, data, training, runs.
"""
