"""``stablelora train``: fine-tune a model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from stablelora_jax.cli import configs
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.utils.errors import InputError

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
        help="print memory and FLOPs of a step, without weights or data",
    )
    parser.add_argument(
        "--jobs", metavar="FILE", type=Path, help="train several adapters side by side on one base, see docs/jobs.md"
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--config``, ``--list-configs``, ``key=value`` and ``--help KEY``, as :func:`load_config` reads them."""
    parser.usage = "%(prog)s [options] [key.sub=value ...]"
    add = parser.add_argument
    add("-h", "--help", action=_KeysHelp, nargs="?", metavar="KEY", help="show this help, or that of a section or key")
    add("--config", metavar="NAME", default=configs.DEFAULT, help="a YAML file, or one of --list-configs (%(default)s)")
    add("--list-configs", action=_ListConfigs, nargs=0, help="list the configurations of this package")
    add("overrides", nargs="*", metavar="key.sub=value", help=argparse.SUPPRESS)


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
    """Load the configuration, then train or do a dry run; or all of that of several jobs."""
    if arguments.jobs is not None:
        _train_jobs(arguments)
        return
    run_config = load_config(arguments)
    if arguments.dry_run:
        from stablelora_jax.runs.dry_run import dry_run

        dry_run(run_config)
        return
    from stablelora_jax.runs.run import run

    run(run_config, log_fn)


def _train_jobs(arguments: argparse.Namespace) -> None:
    from stablelora_jax.jobs.file import load_jobs
    from stablelora_jax.jobs.run import run_jobs

    if arguments.dry_run:
        raise InputError("--dry-run is for one run: leave --jobs out, and give the keys of one of them")
    if arguments.config != configs.DEFAULT:
        raise InputError(f"--config is for one run: name it in {arguments.jobs}, as config: {arguments.config}")
    jobs, found = load_jobs(arguments.jobs, arguments.overrides, configs.find)
    run_jobs(jobs, found, log_fn)


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
    """``--help``: the options and the keys; ``--help KEY``: the keys of that section, or all about that key."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.exit(exit_code(lambda: print(help_of(parser, values), end="")))


def help_of(parser: argparse.ArgumentParser, section: str | None) -> str:
    """The text of ``--help [KEY]``.

    Raises:
      InputError: there is no such section or key.
    """
    from stablelora_jax import config
    from stablelora_jax.config.run import RunConfig

    keys = config.help_text(RunConfig, section)
    if section is not None:
        return keys
    return f"{parser.format_help()}\nkeys, in the YAML file or as key.sub=value on the command line:\n\n{keys}"


class _ListConfigs(argparse.Action):
    """``--list-configs``: the names, one a line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print("\n".join(configs.names()))
        parser.exit()
