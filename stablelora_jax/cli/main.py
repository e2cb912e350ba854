"""``stablelora COMMAND ...``, and the same commands as scripts of their own (``experiments/train.py``)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import stablelora_jax
from stablelora_jax.cli import bench, data, evaluate, export, generate, report, reproduce, sweep, train, width_scaling
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.utils.errors import InputError

COMMANDS = {
    "train": train,
    "sweep": sweep,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
    "report": report,
    "data": data,
    "bench": bench,
    "width-scaling": width_scaling,
    "reproduce": reproduce,
}  # each with SUMMARY, DESCRIPTION, add_options(parser) and command(arguments) -> exit code


def main(argv: Sequence[str] | None = None, *, prog: str = "stablelora") -> int:
    """Run the command line ``argv``, by default the process's; returns the exit code.

    0 for success, 2 for an input that cannot be used, 1 for a run that failed, 128 + N after signal N; every error is
    one line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:  # has subcommands of its own, outside the package
        return bench.forward(words[1:], prog=f"{prog} bench")

    def work() -> int:
        given = make_parser(prog).parse_args(words)
        code: int = given.command(given)
        return code

    return _with_pipe(work)


def script(name: str) -> int:
    """Run the subcommand ``name`` with the process's command line, as the script of that name does."""
    module: Any = COMMANDS[name]
    parser = _Parser(description=module.DESCRIPTION, conflict_handler="resolve")
    module.add_options(parser)
    return _with_pipe(lambda: module.command(parser.parse_args()))


def _with_pipe(work: Callable[[], int]) -> int:
    """``work()``; 1 where the reader of stdout has gone, as ``head`` does, instead of a traceback."""
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def make_parser(prog: str = "stablelora") -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fine-tune language models with LoRA in JAX.",
        epilog=f"'{prog} train' alone fine-tunes a small model that comes with the package, in about a minute on a "
        f"CPU. '{prog} COMMAND --help' shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"stablelora_jax {stablelora_jax.__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        metavar="SHELL",
        help="print a completion script for a shell: bash, zsh, ... (needs shtab)",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands", parser_class=_Parser)
    for name, module in COMMANDS.items():
        own: Any = module
        sub = commands.add_parser(name, help=own.SUMMARY, description=own.DESCRIPTION, conflict_handler="resolve")
        own.add_options(sub)
        sub.set_defaults(command=own.command)
    return parser


class _Parser(argparse.ArgumentParser):
    """Takes positional arguments before, between and after options."""

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside:  # older Pythons parse options, then positional arguments, with this method
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


class _PrintCompletion(argparse.Action):
    """Prints the shell's completion script."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.exit(exit_code(lambda: print(completion(parser, str(values)))))


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a shell.

    Raises:
      InputError: shtab is not installed, or does not know the shell.
    """
    try:
        import shtab
    except ImportError:
        raise InputError("--print-completion needs shtab: pip install shtab") from None
    if shell not in shtab.SUPPORTED_SHELLS:
        raise InputError(f"--print-completion knows {', '.join(shtab.SUPPORTED_SHELLS)}, not {shell!r:.40}")
    text: str = shtab.complete(parser, shell)
    return text
