"""``stablelora data``: how the rows of a task become tokens."""

from __future__ import annotations

import argparse

from stablelora_jax.cli.train import add_config_options, load_config
from stablelora_jax.runs.cli import exit_code

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
    from stablelora_jax.runs.data_summary import data_summary

    data_summary(load_config(arguments), arguments.samples)
