"""``stablelora width-scaling``: how the terms of a LoRA step scale with the width, with and without Stable-LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path

from stablelora_jax.runs.cli import exit_code

SUMMARY = "measure how LoRA's learning scales with the width"
DESCRIPTION = (
    "Train one LoRA layer at many widths, with and without Stable-LoRA's shrink, and compare the exponents of what a "
    "step changes with theory (arXiv 2603.05204, section 3). Writes DIR/results.json and the page DIR/index.html."
)
SIZES = ("full", "test")  # of studies.width_scaling, which imports jax


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--output", metavar="DIR", type=Path, required=True, help="directory of the results; a finished study stays")
    add("--size", choices=SIZES, default="full", help="full: about 2 minutes on 2 cores (default); test: seconds")


def command(arguments: argparse.Namespace) -> int:
    """Measure and write; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Run the study and print the path of its page."""
    from stablelora_jax.studies.width_results import run_study
    from stablelora_jax.utils import compile_cache

    compile_cache.enable()
    print(run_study(arguments.output, arguments.size))
