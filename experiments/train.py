"""Fine-tune a language model: ``python experiments/train.py [--config X.yaml] [key.sub=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import jax

from stablelora_jax import config
from stablelora_jax.config.run import RunConfig
from stablelora_jax.runs.cli import exit_code


def main() -> int:
    """Parse the command line and run; returns the exit code, after a one-line error message if it is not 0."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a language model with Stable-LoRA. Without arguments: fine-tunes the small base model "
        "that ships with the package on a generated task, in a few minutes on a CPU.",
        epilog="keys, in the YAML file or as key.sub=value on the command line:\n\n" + config.help_text(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="YAML file with any of the keys below (default: configs/default.yaml)",
        default=str(Path(__file__).parents[1] / "configs" / "default.yaml"),
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="compile the step from shapes, without weights or data, and print its memory and FLOPs",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys that override those of the file")
    arguments = parser.parse_args()
    code = exit_code(
        lambda: work(arguments), interrupted="interrupted: the same command resumes from the newest checkpoint"
    )
    if code in (1, 2) and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)  # a normal exit would deadlock: jax waits for the other processes, and they for this one
    return code


def work(arguments: argparse.Namespace) -> None:
    """Load the configuration, then train or do a dry run."""
    run_config = config.load(RunConfig, arguments.config, arguments.overrides)
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


if __name__ == "__main__":
    sys.exit(main())
