"""``stablelora reproduce``: the claims of the Stable-LoRA paper, measured, on one page."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from stablelora_jax.cli import configs
from stablelora_jax.runs.cli import exit_code

SUMMARY = "measure the claims of the Stable-LoRA paper, on one page"
DESCRIPTION = (
    "Compare methods at their best learning rates over seeds, shrink ratios, ranks, overhead and forgetting, and write "
    "DIR/index.html, DIR/results.md and DIR/results.json. PRESET: quick (the base of this package, under 10 minutes on "
    "2 cores), real-cpu (SmolLM2-135M, under 90 minutes), real-gpu, paper, or a YAML file: see docs/reproduce.md. The "
    "same command goes on where it was interrupted."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    parser.usage = "%(prog)s PRESET --output DIR [--data DIR] [key.sub=value ...]"
    add("preset", metavar="PRESET", help="quick, real-cpu, real-gpu, paper, or a YAML file")
    add("overrides", nargs="*", metavar="key.sub=value", help="keys of all runs, such as model.path=FILE")
    add("--output", metavar="DIR", type=Path, required=True, help="directory of the runs and of the page")
    add("--data", metavar="DIR", type=Path, help="directory with the rows of each task, TASK/SPLIT.jsonl; else the hub")


def command(arguments: argparse.Namespace) -> int:
    """Measure and write; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments), interrupted="interrupted: the same command goes on from there")


def work(arguments: argparse.Namespace) -> None:
    """Run the study and print the path of its page."""
    from stablelora_jax.studies.reproduce import reproduce

    data = [] if arguments.data is None else ["--data", str(arguments.data)]
    words = ["stablelora", "reproduce", arguments.preset, "--output", str(arguments.output), *data]
    told = {"data": arguments.data, "find": configs.find, "command": shlex.join([*words, *arguments.overrides])}
    print(reproduce(arguments.preset, arguments.output, arguments.overrides, **told))
