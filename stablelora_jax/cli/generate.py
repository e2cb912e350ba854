"""``stablelora generate``: continue prompts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from stablelora_jax.runs.cli import add_model_options, exit_code, load_model
from stablelora_jax.utils.errors import InputError, brief
from stablelora_jax.utils.files import as_path

SUMMARY = "continue prompts"
DESCRIPTION = (
    "Continue prompts with a language model, with or without an adapter. Prompts come from --prompt, "
    "from --prompts, or else one per line from standard input."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add_model_options(parser)
    add("--prompt", metavar="TEXT", nargs="+", help="prompts")
    add(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='file with one prompt per line; in a .jsonl a string, {"prompt": ...} or {"messages": [...]}',
    )
    add("--chat", action="store_true", help="treat each prompt as a user message and apply the chat template")
    add("--max-new-tokens", metavar="N", type=int, default=64, help="maximum number of new tokens (default 64)")
    add("--temperature", metavar="T", type=float, default=0.0, help="sampling temperature; 0 (default) is greedy")
    add("--top-k", metavar="K", type=int, help="sample from the K most likely tokens")
    add("--top-p", metavar="P", type=float, help="nucleus sampling: from the most likely tokens of total probability P")
    add("--stop", metavar="STR", nargs="+", default=[], help="stop strings")
    add("--seed", metavar="S", type=int, default=0, help="random seed of the sampling (default 0)")
    add("--batch-size", metavar="B", type=int, help="prompts per batch (default: all, at most 32)")
    add(
        "--output",
        metavar="FILE.jsonl",
        type=Path,
        help="write prompts, texts and tokens to a new file (or an existing pipe or device) instead of printing",
    )


def command(arguments: argparse.Namespace) -> int:
    """Run; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Load the model, generate, and print or write; an output that cannot be written is detected first."""
    prompts = read_prompts(arguments)
    if arguments.output is None:
        for row in rows(arguments, prompts):
            prompt = row["prompt"] if isinstance(row["prompt"], str) else ""
            print(prompt + str(row["text"]) if prompt else row["text"], flush=True)
        return
    from stablelora_jax.utils.outputs import open_output

    with open_output(arguments.output) as output:
        for row in rows(arguments, prompts):
            output.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows(arguments: argparse.Namespace, prompts: list[Any]) -> list[dict[str, Any]]:
    """The result for each prompt: ``prompt``, ``text``, ``tokens`` and ``stop`` (the reason it ended)."""
    from stablelora_jax.generation.generate import generate

    model, variables = load_model(arguments)
    results = generate(
        model,
        variables,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop_strings=arguments.stop,
        seed=arguments.seed,
        batch_size=min(len(prompts), 32) if arguments.batch_size is None else arguments.batch_size,
        progress=True,
    )
    return [
        {"prompt": p, "text": r.text, "tokens": r.tokens, "stop": r.stop} for p, r in zip(prompts, results, strict=True)
    ]


def read_prompts(arguments: argparse.Namespace) -> list[Any]:
    """The prompts from the command line, a file or standard input, as ``generate`` takes them.

    Raises:
      InputError: no prompt, two sources of prompts, or a file that cannot be read.
    """
    if arguments.prompt is not None and arguments.prompts is not None:
        raise InputError("give --prompt or --prompts, not both")
    if arguments.prompt is not None:
        prompts = list(arguments.prompt)
    elif arguments.prompts is not None:
        prompts = read_file(arguments.prompts)
    else:
        prompts = [line for line in read_input().splitlines() if line.strip()]
    if not prompts:
        raise InputError("there is no prompt: give --prompt, --prompts, or lines on the standard input")
    as_chat = arguments.chat
    return [[{"role": "user", "content": p}] if as_chat and isinstance(p, str) else p for p in prompts]


def read_input() -> str:
    """The text on standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"the standard input is not UTF-8: {error}") from None


def read_file(path: Path) -> list[Any]:
    """One prompt per line; a byte-order mark and blank lines are skipped."""
    path = as_path(path, "--prompts")
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from None
    return [line_prompt(path, n, line) if path.suffix == ".jsonl" else line.rstrip("\r") for n, line in lines]


def line_prompt(path: Path, number: int, line: str) -> Any:
    """The prompt of one line of a ``.jsonl``."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number} is not JSON: {brief(error)}") from None
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if not isinstance(value, str | list):
        raise InputError(f'{path}, line {number} must be a string, {{"prompt": ...}} or {{"messages": [...]}}')
    return value
