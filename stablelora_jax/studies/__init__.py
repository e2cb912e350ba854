"""Experiments that compare measurements with theory; each has a command and writes one page.

Imports: utils, optimizers, training, runs.
"""
