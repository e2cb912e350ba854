"""Measure what things cost: ``python experiments/bench.py train|curves|optimizers|gpu ...``; each has its ``--help``.

``train``: tokens a second, memory and compile time of the training step, alone or in turn with PEFT or tunix.
``curves``: how these grow with tokens, length, layers and rank. ``optimizers``: what an update of each optimizer costs.
``gpu``: everything that is to be known of a GPU, in one call that may be started again.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from stablelora_jax.runs.cli import exit_code

WHAT = ("train", "curves", "optimizers", "gpu")


def parser(**about: Any) -> argparse.ArgumentParser:
    """One that says what is wrong in one line, as the other scripts do."""
    made = argparse.ArgumentParser(**about, allow_abbrev=False)
    made.error = lambda message: made.exit(2, f"error: {message}\n")  # type: ignore[assignment,method-assign]
    return made


def main() -> int:
    """Parse the command line and measure."""
    about = (__doc__ or "").split("\n")
    front = parser(description=about[0], epilog=" ".join(about[2:]))
    front.add_argument("what", choices=WHAT)
    what = front.parse_args(sys.argv[1:2]).what
    module = import_module(f"bench.{what}")
    own = parser(prog=f"bench.py {what}", description=(module.__doc__ or "").split("\n")[0])
    module.add_options(own)
    given = own.parse_args(sys.argv[2:])
    return exit_code(lambda: module.bench(given))
