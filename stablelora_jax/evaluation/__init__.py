"""Evaluation as lm-evaluation-harness does it: log-likelihoods, multiple choice, generation, tasks.

Imports: utils, parallel, models, interop, data, training, generation.
"""
