"""``bench.py curves``: how the cost of a training step grows with rows, length, layers and rank.

Each point is a process of its own that does what ``bench.py train`` measures, with one number of the shape changed: its
step time (median of the rounds), the time to compile the step, and the highest memory since the warm-up beyond what the
process held before there was a model (on an accelerator: all that its allocator has given).
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import quartiles
from bench.shapes import SHAPES
from bench.train import add_options as add_train_options
from bench.train import work_of
from bench.turns import OURS, measured
from bench.work import Work
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import write_new
from stablelora_jax.utils.outputs import require_new

AXES = ("batch", "length", "layers", "rank")
FACTORS = (0.5, 1, 2, 4)
PANELS = {"step": "s a step", "compile": "s to compile", "memory": "GB"}


class Point(NamedTuple):
    """A measured step."""

    axis: str
    value: int
    step: float  # seconds
    compile: float  # seconds
    memory: float  # GB


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench.py curves``."""
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="where curves.md, curves.json and curves.png go")
    add("--shape", choices=sorted(SHAPES), default="llama-15m", help="the architecture in the middle (llama-15m)")
    add("--batch", type=int, default=4, metavar="B", help="its rows (default 4)")
    add("--length", type=int, default=128, metavar="T", help="its tokens of a row (default 128)")
    add("--rank", type=int, default=8, metavar="R", help="its rank (default 8)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base and of products")
    add("--steps", type=int, default=2, metavar="N", help="timed steps of a round (default 2)")
    add("--rounds", type=int, default=3, metavar="N", help="rounds (default 3)")


def works(given: argparse.Namespace) -> list[tuple[str, int, Work]]:
    """``(axis, value, work)`` of all points: each axis at :data:`FACTORS` of its value, the others as they are.

    Raises:
      InputError: a number out of range.
    """
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    flags = {key: getattr(given, key) for key in ("shape", "batch", "length", "rank", "dtype")}
    middle = work_of(argparse.Namespace(**{**vars(parser.parse_args([])), **flags, "devices": 1}))
    here = {axis: getattr(middle, axis, middle.config["num_hidden_layers"]) for axis in AXES}
    found = []
    for axis in AXES:
        for value in sorted({max(1, round(here[axis] * factor)) for factor in FACTORS}):
            layers = value if axis == "layers" else here["layers"]
            config = {**middle.config, "num_hidden_layers": layers}
            changed = {} if axis == "layers" else {axis: value}
            found.append((axis, value, dataclasses.replace(middle, config=config, **changed)))
    return found


def point(axis: str, value: int, work: Work, steps: int, rounds: int) -> Point:
    """Measure one."""
    found = measured([OURS], work, steps, rounds, True)[OURS]
    held = found["steps_bytes"] - found["before_bytes"] if found.get("steps_bytes") else found["peak_memory_bytes"]
    return Point(axis, value, quartiles(found["round_seconds"])[1], found["compile_seconds"], (held or 0) / 1e9)


def table(points: Sequence[Point]) -> str:
    """The points as Markdown."""
    lines = ["| axis | value | step, ms | compile, s | memory, MB |", "| --- " * 5 + "|"]
    for p in points:
        lines.append(f"| {p.axis} | {p.value} | {1e3 * p.step:.1f} | {p.compile:.2f} | {1e3 * p.memory:.0f} |")
    return "\n".join(lines) + "\n"


def figure(points: Sequence[Point], title: str) -> Any:
    """A column for each axis, a row for each of :data:`PANELS`, all from zero."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(11, 6), layout="constrained")
    grid: Any = made.subplots(len(PANELS), len(AXES), sharex="col", sharey="row")
    for row, (name, unit) in enumerate(PANELS.items()):
        for column, axis in enumerate(AXES):
            own = [p for p in points if p.axis == axis]
            ax = grid[row, column]
            ax.plot([p.value for p in own], [getattr(p, name) for p in own], "o-", color="tab:blue", markersize=4)
            ax.set_xlim(0, 1.08 * max(p.value for p in own))
            ax.grid(alpha=0.3)
        grid[row, 0].set_ylim(0, 1.08 * max(getattr(p, name) for p in points) or 1)
        grid[row, 0].set_ylabel(unit)
    for ax, axis in zip(grid[-1], AXES, strict=True):
        ax.set_xlabel({"batch": "rows", "length": "tokens of a row"}.get(axis, axis))
    made.suptitle(title, fontsize=10)
    return made


def bench(given: argparse.Namespace) -> None:
    """Measure, print, and write the table, the numbers and the picture."""
    if not given.output.parent.is_dir():
        raise InputError(f"--output: there is no folder {given.output.parent}: make it first")
    if min(given.steps, given.rounds) < 1:
        raise InputError("--steps and --rounds must be at least 1")
    for name in ("curves.md", "curves.json", "curves.png"):
        require_new(given.output / name)
    todo = works(given)
    given.output.mkdir(exist_ok=True)
    points: list[Point] = []
    for number, (axis, value, work) in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {axis} {value}", file=sys.stderr)
        points.append(point(axis, value, work, given.steps, given.rounds))
    text = table(points)
    title = f"{given.shape}, {given.batch} x {given.length} tokens, r={given.rank}, all-linear, {given.dtype}"
    title += "; along each axis the rest stays"
    print(f"{title}\n\n{text}", end="")
    write_new(given.output / "curves.md", f"{title}\n\n{text}".encode())
    write_new(given.output / "curves.json", (json.dumps([p._asdict() for p in points]) + "\n").encode())
    picture = io.BytesIO()
    figure(points, title).savefig(picture, format="png", dpi=120)
    write_new(given.output / "curves.png", picture.getvalue())
