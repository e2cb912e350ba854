"""``stablelora evaluate``: evaluate a model on tasks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stablelora_jax.runs.cli import add_model_options, exit_code, load_model
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.outputs import require_new

SUMMARY = "evaluate a model on tasks"
DESCRIPTION = (
    "Evaluate a language model, with or without an adapter, as EleutherAI's lm-evaluation-harness "
    "does: multiple choice by log-likelihood, GSM8K by generation (greedy, zero-shot), perplexity of text. "
    "Tasks: hellaswag, social_i_qa, openbookqa, arc_easy, arc_challenge, merged_qa, gsm8k, text."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add_model_options(parser)
    add("--tasks", metavar="NAMES", required=True, help="task names, comma-separated")
    add("--data", metavar="DIR", type=Path, help="directory with TASK/SPLIT.jsonl or .jsonl.gz (default: the hub)")
    add("--split", metavar="SPLIT", help="split to evaluate (default: validation; for gsm8k: test)")
    add("--limit", metavar="N", type=int, help="evaluate only the first N rows of each task")
    add("--output", metavar="OUT", type=Path, help="write OUT/summary.json and OUT/TASK.jsonl; OUT must not exist")
    add("--batch-size", metavar="B", type=int, default=16, help="sequences per batch (default 16)")
    add(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=256,
        help="maximum length of a generated answer (default 256)",
    )


def command(arguments: argparse.Namespace) -> int:
    """Run; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Load the model, evaluate it, write the results if asked, and print the table."""
    if arguments.output is not None:
        require_new(arguments.output)
    from stablelora_jax.evaluation.tasks import TASKS, measure, subject, table, write

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    for name in names:
        if name not in TASKS:
            raise InputError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    if not names:
        raise InputError(f"--tasks names no task; the tasks are {', '.join(TASKS)}")
    model, variables = load_model(arguments)
    one = subject(model, variables, batch_size=arguments.batch_size, progress=sys.stderr.isatty())
    options = (arguments.data, arguments.split, arguments.limit, arguments.max_new_tokens)
    results = {name: measure(one, name, *options) for name in names}
    if arguments.output is not None:
        metadata = {"model": arguments.model, "adapter": str(arguments.adapter) if arguments.adapter else None}
        write(arguments.output, results, metadata | {"dtype": arguments.dtype, "limit": arguments.limit})
    print(table(results), flush=True)
