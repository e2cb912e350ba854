"""``stablelora report``: the pictures of runs, or one HTML page of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from stablelora_jax.runs.cli import exit_code

SUMMARY = "draw a run's pictures, or write its HTML page"
DESCRIPTION = "Draw the pictures of runs, or write one HTML page that shows them side by side; also while they go on."
PAGE = "report.html"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", type=Path, help="run directory of 'stablelora train'")
    add("--html", action="store_true", help="write a self-contained HTML page instead of PNG files")
    add(
        "--output",
        metavar="PATH",
        type=Path,
        help=f"the page (default: RUN/{PAGE}, or {PAGE} here for several runs); without --html the directory of the "
        "pictures of one run (default: the run's) or of losses.png of several (default: here)",
    )


def command(arguments: argparse.Namespace) -> int:
    """Draw or write; returns the exit code, after a one-line error message if it is not 0."""
    return exit_code(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> None:
    """Draw the pictures, or write the page, and print the paths."""
    if not arguments.html:
        from stablelora_jax.runs.plots import report

        report(arguments.runs, arguments.output)
        return
    from stablelora_jax.runs.report import write_page

    runs = arguments.runs
    output = arguments.output or (runs[0] / PAGE if len(runs) == 1 else Path(PAGE))
    print(write_page(runs, output))
