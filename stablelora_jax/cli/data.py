"""``stablelora data``: how the rows of a task become tokens."""

from __future__ import annotations

import argparse
import os
import sys

from stablelora_jax.cli.train import add_config_options, load_config
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.utils.errors import InputError

SUMMARY = "show how the rows of a task become tokens"
DESCRIPTION = (
    "Show how the rows of a configuration's task become tokens: counts, lengths, truncation, padding, and samples "
    "with the loss tokens marked. Only the tokenizer of the model is loaded."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config_options(parser)
    parser.add_argument("--samples", metavar="N", type=int, default=2, help="rows to show of each split (default 2)")


def command(arguments: argparse.Namespace) -> int:
    """Show the data; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Load the configuration and the rows, and print."""
    config = load_config(arguments)
    if arguments.samples < 0:
        raise InputError(f"--samples must not be negative, not {arguments.samples}")
    from stablelora_jax.runs.data_summary import BRACKETS, GREEN, data_summary

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    data_summary(config, arguments.samples, marks=GREEN if colour else BRACKETS)
