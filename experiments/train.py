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
    """Parse the command line, run, and turn what goes wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a language model with Stable-LoRA. Without arguments: the small base model that ships "
        "with the package learns a generated task in a few minutes on a CPU.",
        epilog="keys, for the YAML file and as key.sub=value on the command line:\n\n" + config.help_text(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="file with any of the keys below; configs/default.yaml unless given",
        default=str(Path(__file__).parents[1] / "configs" / "default.yaml"),
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="compile the step from shapes, without weights and data, and print the memory and FLOPs that it needs",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys that replace those of the file")
    arguments = parser.parse_args()
    code = exit_code(
        lambda: work(arguments), interrupted="interrupted: the same command goes on from the newest checkpoint"
    )
    if code in (1, 2) and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)  # jax would wait for the other processes, which wait for this one
    return code


def work(arguments: argparse.Namespace) -> None:
    """Load the configuration, and train or try it dry."""
    run_config = config.load(RunConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        from stablelora_jax.runs.dry_run import dry_run

        dry_run(run_config)
        return
    from stablelora_jax.runs.run import run

    run(run_config, log_fn)


def log_fn(text: str) -> None:
    """Print; where that is no longer read, or cannot be kept, training goes on in silence."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
