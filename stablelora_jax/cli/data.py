"""``stablelora data``: how the rows of a task, or of a directory, become tokens."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from stablelora_jax.cli.train import add_config_options, load_config
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.utils.errors import InputError

FILES = ("train.jsonl", "train.jsonl.gz")
SUMMARY = "show how the rows of a task become tokens"
DESCRIPTION = (
    "Show how the rows of a configuration's task become tokens: counts, lengths, truncation, padding, and samples "
    "with the loss tokens marked. Only the tokenizer of the model is loaded. A directory with train.jsonl, or that "
    "file, may come before the keys: its rows are recognised by their columns."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config_options(parser)
    parser.usage = "%(prog)s [options] [PATH] [key.sub=value ...]"
    shown = "rows to show of each split (default 2)"
    parser.add_argument("--samples", "--show", metavar="N", type=int, default=2, help=shown)


def command(arguments: argparse.Namespace) -> int:
    """Show the data; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Load the configuration and the rows, and print."""
    arguments.overrides = with_path(arguments.overrides)
    config = load_config(arguments)
    if arguments.samples < 0:
        raise InputError(f"--samples must not be negative, not {arguments.samples}")
    from stablelora_jax.runs.data_summary import BRACKETS, GREEN, data_summary

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    data_summary(config, arguments.samples, marks=GREEN if colour else BRACKETS)


def with_path(overrides: list[str]) -> list[str]:
    """``overrides`` with a first one that is a path, not ``key=value``, as keys of the task jsonl.

    Raises:
      InputError: it is a file that is not ``train.jsonl`` or ``train.jsonl.gz``.
    """
    if not overrides or "=" in overrides[0]:
        return overrides
    path = Path(overrides[0])
    if path.is_file():
        if path.name not in FILES:
            raise InputError(f"{path}: a task reads a directory with {FILES[0]}: give the rows that name")
        path = path.parent
    held_out = any((path / f"validation{end}").is_file() for end in (".jsonl", ".jsonl.gz"))
    keys = [
        "task.name=jsonl",
        f"task.path={json.dumps(str(path))}",
        "task.kind=auto",
        f"evaluate={str(held_out).lower()}",
    ]
    return [*keys, *overrides[1:]]
