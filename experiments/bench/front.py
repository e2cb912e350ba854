"""Run a benchmark: ``python experiments/bench.py train|curves|optimizers|jobs|gpu ...``; each has its own ``--help``.

``train``: tokens per second, memory and compile time of the training step, alone or interleaved with PEFT or tunix.
``curves``: how these scale with rows, length, layers and rank. ``optimizers``: the cost of an update of each optimizer.
``gpu``: the complete GPU suite in one command, which resumes where it was interrupted.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from stablelora_jax.runs.cli import exit_code

COMMANDS = ("train", "curves", "optimizers", "jobs", "gpu")


def parser(**options: Any) -> argparse.ArgumentParser:
    """An argument parser that reports an error in one line, as the other scripts do."""
    made = argparse.ArgumentParser(**options, allow_abbrev=False)
    made.error = lambda message: made.exit(2, f"error: {message}\n")  # type: ignore[assignment,method-assign]
    return made


def main(argv: list[str] | None = None, *, prog: str = "bench.py") -> int:
    """Parse the command line ``argv`` (the process's) and run the benchmark; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    lines = (__doc__ or "").split("\n")
    front = parser(prog=prog, description=lines[0], epilog=" ".join(lines[2:]))
    front.add_argument("command", choices=COMMANDS)
    command = front.parse_args(words[:1]).command
    module = import_module(f"bench.{command}")
    subparser = parser(prog=f"{prog} {command}", description=(module.__doc__ or "").split("\n")[0])
    module.add_options(subparser)
    given = subparser.parse_args(words[1:])
    return exit_code(lambda: module.bench(given))
