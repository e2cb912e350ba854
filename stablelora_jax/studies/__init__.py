"""Experiments that compare measurements with theory; each has a command and writes one page.

Imports: utils, lora, optimizers, config, interop, data, training, evaluation, runs, jobs.
"""
