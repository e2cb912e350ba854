"""Measure a model on tasks: ``python experiments/evaluate.py MODEL [--adapter DIR] --tasks arc_easy,gsm8k``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stablelora_jax import InputError
from stablelora_jax.runs.cli import add_model_options, exit_code, load_model
from stablelora_jax.utils.outputs import require_new


def main() -> int:
    """Parse the command line, measure, and turn unusable input into one line and exit code 2."""
    arguments = parse()
    return exit_code(lambda: run(arguments))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure a language model, with or without an adapter, by the definitions of EleutherAI's "
        "lm-evaluation-harness: multiple choice by log-likelihood, GSM8K by generation (greedy, zero-shot), perplexity "
        "of text. Tasks: hellaswag, social_i_qa, openbookqa, arc_easy, arc_challenge, merged_qa, gsm8k, text."
    )
    add = parser.add_argument
    add_model_options(parser)
    add("--tasks", metavar="NAMES", required=True, help="names of tasks, with commas between")
    add("--data", metavar="DIR", type=Path, help="directory with TASK/SPLIT.jsonl or .jsonl.gz; default: the hub")
    add("--split", metavar="SPLIT", help="default: validation, and test for gsm8k")
    add("--limit", metavar="N", type=int, help="only the first N rows of each task")
    add("--output", metavar="OUT", type=Path, help="write OUT/summary.json and OUT/TASK.jsonl; OUT must not exist")
    add("--batch-size", metavar="B", type=int, default=16, help="texts that run together (default 16)")
    add("--max-new-tokens", metavar="N", type=int, default=256, help="of a generated answer (default 256)")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Load, measure, write, and print the table."""
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
    given = (arguments.data, arguments.split, arguments.limit, arguments.max_new_tokens)
    measured = {name: measure(one, name, *given) for name in names}
    if arguments.output is not None:
        about = {"model": arguments.model, "adapter": str(arguments.adapter) if arguments.adapter else None}
        write(arguments.output, measured, about | {"dtype": arguments.dtype, "limit": arguments.limit})
    print(table(measured), flush=True)


if __name__ == "__main__":
    sys.exit(main())
