"""``stablelora evaluate``: evaluate a model on tasks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stablelora_jax.runs.cli import add_model_options, exit_code, load_model
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.outputs import require_new

SUMMARY = "evaluate a model on tasks, or on rows of your own"
DESCRIPTION = (
    "Evaluate a language model, with or without an adapter, as EleutherAI's lm-evaluation-harness "
    "does: multiple choice by log-likelihood, GSM8K by generation (greedy, zero-shot), perplexity of text. "
    "Tasks: hellaswag, social_i_qa, openbookqa, arc_easy, arc_challenge, merged_qa, gsm8k, text, and jsonl for rows of "
    "your own: accuracy of multiple choice, held-out loss of completions and chats."
)
KINDS = ("choice", "completion", "chat", "text")
JSONL = "jsonl"
KEYS = {"task.fields.": "--fields: ", "task.path": "--data", "set data.chat_template to false": "give --no-chat"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add_model_options(parser)
    add("--tasks", metavar="NAMES", required=True, help="task names, comma-separated")
    add(
        "--data",
        metavar="DIR",
        type=Path,
        help="directory with TASK/SPLIT.jsonl or .jsonl.gz (default: the hub); for jsonl with SPLIT.jsonl",
    )
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
    add("--kind", choices=KINDS, help="what a row of --tasks jsonl is (default completion)")
    add("--fields", metavar="MAP", help="columns of --tasks jsonl that have other names: '{prompt: question}'")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put the prompts of --tasks jsonl into the model's chat template (default: of chats alone)",
    )


def command(arguments: argparse.Namespace) -> int:
    """Run; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Load the model, evaluate it, write the results if asked, and print the table."""
    if arguments.output is not None:
        require_new(arguments.output)
    from stablelora_jax.evaluation.tasks import measure, subject, table, write

    names = task_names(arguments)
    items = own_items(arguments) if JSONL in names else []
    model, variables = load_model(arguments)
    one = subject(model, variables, batch_size=arguments.batch_size, progress=True)
    options = (arguments.data, arguments.split, arguments.limit, arguments.max_new_tokens)
    results = {
        name: measure_own(one, items, arguments) if name == JSONL else measure(one, name, *options) for name in names
    }
    if arguments.output is not None:
        metadata = {"model": arguments.model, "adapter": str(arguments.adapter) if arguments.adapter else None}
        write(arguments.output, results, metadata | {"dtype": arguments.dtype, "limit": arguments.limit})
    print(table(results), flush=True)


def task_names(arguments: argparse.Namespace) -> list[str]:
    """The names in ``--tasks``.

    Raises:
      InputError: none, an unknown one, or options of jsonl without it.
    """
    from stablelora_jax.evaluation.tasks import TASKS

    known = (*TASKS, JSONL)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"there is no task {name!r}; the tasks are {', '.join(known)}")
    if not names:
        raise InputError(f"--tasks names no task; the tasks are {', '.join(known)}")
    if JSONL not in names and (arguments.kind or arguments.fields or arguments.chat is not None):
        raise InputError("--kind, --fields and --chat describe rows of your own: they need --tasks jsonl")
    return names


def own_items(arguments: argparse.Namespace) -> list[Any]:
    """The rows of ``--data``.

    Raises:
      InputError: there is no ``--data``, or its rows are not what ``--kind`` and ``--fields`` say.
    """
    from stablelora_jax import config
    from stablelora_jax.config.run import JsonlTask
    from stablelora_jax.data.tasks import load_questions

    if arguments.data is None:
        raise InputError("--tasks jsonl needs --data DIR, the directory of your SPLIT.jsonl")
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"limit must be positive, not {arguments.limit}")
    fields = [f"fields={arguments.fields}"] if arguments.fields else []
    task = config.load(JsonlTask, None, [f"kind={arguments.kind or 'completion'}", *fields])
    with _options_named():
        return load_questions(replace(task, path=str(arguments.data)), split_of(arguments))[: arguments.limit]


def split_of(arguments: argparse.Namespace) -> str:
    """The split of the rows of your own."""
    return arguments.split or "validation"


def measure_own(subject: Any, items: list[Any], arguments: argparse.Namespace) -> Any:
    """The result of ``--tasks jsonl``."""
    from stablelora_jax.evaluation.completions import measure_items

    chat = arguments.kind == "chat" if arguments.chat is None else arguments.chat
    with _options_named():
        return measure_items(subject, items, split_of(arguments), chat=chat)


@contextmanager
def _options_named() -> Iterator[None]:
    """An InputError that names keys of a configuration names the options of this command instead."""
    try:
        yield
    except InputError as error:
        said = re.sub(r"task\.fields=(\{.*\})", r"--fields '\1'", str(error))
        for key, option in KEYS.items():
            said = said.replace(key, option)
        raise InputError(said) from None
