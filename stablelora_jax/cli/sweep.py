"""``stablelora sweep``: a grid of runs, trained side by side, and a table of their results."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from stablelora_jax.cli import configs
from stablelora_jax.cli.train import log_fn
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.utils.errors import RunError

SUMMARY = "train a grid of runs side by side, and compare them"
DESCRIPTION = (
    "Train every point of a grid (methods, learning rates, seeds, ...), several side by side in one step. Finished "
    "points are not repeated. Where FILE says so, workers of Ray train them, or Optuna chooses them. Writes "
    "results.json and results.md with mean and standard deviation over seeds."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.usage = "%(prog)s FILE [key.sub=value ...]"
    parser.add_argument("file", metavar="FILE", type=Path, help="the grid, a YAML file: see docs/jobs.md")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="keys of all points")


def command(arguments: argparse.Namespace) -> int:
    """Train and write the results; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments), interrupted="interrupted: the same command goes on from the checkpoints")


def work(arguments: argparse.Namespace) -> None:
    """Train the points that are left and print the table.

    Raises:
      RunError: some point failed; the table is written all the same.
    """
    from stablelora_jax.jobs.search import run_search
    from stablelora_jax.jobs.sweep import load_sweep, point_maker, run_sweep
    from stablelora_jax.jobs.sweep_table import RESULTS, require_own, write_results

    sweep, points = load_sweep(arguments.file, arguments.overrides, configs.find)
    require_own(Path(sweep.output))
    search = sweep.search is not None
    if search:
        make = point_maker(arguments.file, sweep, arguments.overrides, configs.find)
        points, done, failed = run_search(sweep, make, log_fn)
    else:
        done, failed = run_sweep(sweep, points, log_fn)
    words = ["stablelora", "sweep", str(arguments.file), *arguments.overrides]
    print(write_results(Path(sweep.output), points, done, failed, shlex.join(words), search), end="")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(points)} points failed ({', '.join(failed)}); see {sweep.output}/{RESULTS}"
        )
