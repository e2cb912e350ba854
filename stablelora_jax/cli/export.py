"""``stablelora export``: an adapter in the format of another program."""

from __future__ import annotations

import argparse

from stablelora_jax.runs.cli import exit_code

SUMMARY = "write an adapter for PEFT, vLLM or llama.cpp, or merge it"
DESCRIPTION = "Export a trained adapter in the format of another program."
KINDS = ("peft", "vllm", "gguf", "merged")  # of interop.export, which imports jax


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, or a PEFT adapter")
    add("--to", required=True, choices=KINDS, help="merged: a full model; gguf: for llama.cpp")
    add("--output", metavar="PATH", help="output path (default: RUN/export/KIND); must not exist")
    add("--base", metavar="MODEL", help="base model, if RUN does not name it: directory, .gguf, hub id")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of a merged model (default: the run's)")
    add("--untie", action="store_true", help="untie the head, for an adapter of only one of a tied pair")
    add("--strict", action="store_true", help="refuse a base other than the one the adapter was made on")


def command(arguments: argparse.Namespace) -> int:
    """Export; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Export the adapter."""
    from stablelora_jax.interop.export import export

    export(
        arguments.run,
        arguments.to,
        output=arguments.output,
        base=arguments.base,
        dtype=arguments.dtype,
        untie=arguments.untie,
        strict=arguments.strict,
    )
