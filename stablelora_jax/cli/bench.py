"""``stablelora bench``: the benchmarks of ``experiments/bench/``, which a wheel does not contain."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stablelora_jax.runs.cli import exit_code
from stablelora_jax.utils.errors import InputError

SUMMARY = "measure speed and memory (in a source tree)"
DESCRIPTION = "Measure the training step, alone or beside PEFT and tunix, and the optimizers."
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, which the benchmarks parse."""
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="train|curves|optimizers|gpu ...")


def command(arguments: argparse.Namespace) -> int:
    """Run a benchmark; returns the exit code."""
    return forward(arguments.words, prog="stablelora bench")


def forward(words: Sequence[str], *, prog: str) -> int:
    """Run ``experiments/bench.py`` with ``words``; returns the exit code."""
    if not (EXPERIMENTS / "bench" / "front.py").is_file():
        return exit_code(_absent)
    if str(EXPERIMENTS) not in sys.path:
        sys.path.insert(0, str(EXPERIMENTS))
    from bench.front import main

    code: int = main(list(words), prog=prog)
    return code


def _absent() -> None:
    raise InputError(
        "the benchmarks are not in the wheel: unpack the source distribution (pip download --no-deps "
        "--no-binary :all: stablelora-jax) or clone the repository, and run python experiments/bench.py there"
    )
