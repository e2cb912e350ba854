"""The command ``stablelora``: one file a subcommand, each a thin layer over functions of the package.

No file here imports jax before a subcommand runs, so that ``--help``, ``--version`` and wrong options answer at once.

Imports: utils, config, data, interop, generation, evaluation, runs, jobs, studies.
"""
