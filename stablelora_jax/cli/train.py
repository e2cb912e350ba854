"""``stablelora train``: fine-tune a model."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from stablelora_jax.cli import configs
from stablelora_jax.runs.cli import exit_code

SUMMARY = "fine-tune a model"
DESCRIPTION = (
    "Fine-tune a language model with Stable-LoRA. Without arguments: fine-tunes the small base model "
    "that ships with the package on a generated task, in a few minutes on a CPU."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config_options(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="compile the step from shapes, without weights or data, and print its memory and FLOPs",
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--config``, ``--list-configs``, ``key=value`` and ``--help SECTION``, as :func:`load_config` reads them."""
    add = parser.add_argument
    add("-h", "--help", action=_KeysHelp, nargs="?", metavar="SECTION", help="show this help, or the keys of a section")
    add(
        "--config",
        metavar="NAME|YAML",
        default=configs.DEFAULT,
        help="YAML file with any of the keys, or the name of a configuration of this package (default: %(default)s)",
    )
    add("--list-configs", action=_ListConfigs, nargs=0, help="list the configurations of this package")
    add("overrides", nargs="*", metavar="key.sub=value", help="keys that override those of the file")


def load_config(arguments: argparse.Namespace) -> Any:
    """The RunConfig that the options describe.

    Raises:
      InputError: no such file, key or value.
    """
    from stablelora_jax import config
    from stablelora_jax.config.run import RunConfig

    return config.load(RunConfig, configs.find(arguments.config), arguments.overrides)


def command(arguments: argparse.Namespace) -> int:
    """Run; returns the exit code, after a one-line error message if it is not 0."""
    code = exit_code(
        lambda: work(arguments), interrupted="interrupted: the same command resumes from the newest checkpoint"
    )
    if code in (1, 2) and _is_distributed():
        sys.stderr.flush()
        os._exit(code)  # a normal exit would deadlock: jax waits for the other processes, and they for this one
    return code


def work(arguments: argparse.Namespace) -> None:
    """Load the configuration, then train or do a dry run."""
    run_config = load_config(arguments)
    if arguments.dry_run:
        from stablelora_jax.runs.dry_run import dry_run

        dry_run(run_config)
        return
    from stablelora_jax.runs.run import run

    run(run_config, log_fn)


def log_fn(text: str) -> None:
    """Print a line; if stdout is closed or full, training continues without output."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_distributed() -> bool:
    import jax

    initialized: bool = jax.distributed.is_initialized()
    return initialized


class _KeysHelp(argparse.Action):
    """``--help``: the options and the keys; ``--help SECTION``: the keys of that section."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.exit(exit_code(lambda: print(help_of(parser, values), end="")))


def help_of(parser: argparse.ArgumentParser, section: str | None) -> str:
    """The text of ``--help [SECTION]``.

    Raises:
      InputError: there is no such section.
    """
    from stablelora_jax import config
    from stablelora_jax.config.run import RunConfig

    show: Any = config.help_text
    try:
        keys = show(RunConfig, section)
    except TypeError:
        keys = show(RunConfig)
    if section is not None:
        return str(keys)
    return f"{parser.format_help()}\nkeys, in the YAML file or as key.sub=value on the command line:\n\n{keys}"


class _ListConfigs(argparse.Action):
    """``--list-configs``: the names, one a line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print("\n".join(configs.names()))
        parser.exit()
