"""``bench.py curves``: how the cost of a training step scales with rows, length, layers and rank.

Each point is measured as ``bench.py train`` measures a step, in a separate process and with one dimension changed. It
gives the step time (median over the rounds), the compile time of the step, and the peak memory after the warm-up minus
the memory before the model was created (on an accelerator: the allocator's peak).
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
from bench.turns import OURS, measure_sides
from bench.work import Workload
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import write_new
from stablelora_jax.utils.outputs import require_new

AXES = ("batch", "length", "layers", "rank")
FACTORS = (0.5, 1, 2, 4)
PANELS = {"step": "step time, s", "compile": "compile time, s", "memory": "memory, GB"}


class Point(NamedTuple):
    """The measurement of one step."""

    axis: str
    value: int
    step: float  # seconds
    compile: float  # seconds
    memory: float  # GB


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench.py curves``."""
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="directory for curves.md, curves.json and curves.png")
    add("--shape", choices=sorted(SHAPES), default="llama-15m", help="architecture of the reference point (llama-15m)")
    add("--batch", type=int, default=4, metavar="B", help="rows per step at the reference point (default 4)")
    add("--length", type=int, default=128, metavar="T", help="tokens per row at the reference point (default 128)")
    add("--rank", type=int, default=8, metavar="R", help="LoRA rank at the reference point (default 8)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the base and of the matmuls")
    add("--steps", type=int, default=2, metavar="N", help="timed steps per round (default 2)")
    add("--rounds", type=int, default=3, metavar="N", help="number of rounds (default 3)")


def workloads(given: argparse.Namespace) -> list[tuple[str, int, Workload]]:
    """``(axis, value, workload)`` of all points: one axis scaled by :data:`FACTORS`, the others at the reference point.

    Raises:
      InputError: a number is out of range.
    """
    parser = argparse.ArgumentParser()
    add_train_options(parser)
    flags = {key: getattr(given, key) for key in ("shape", "batch", "length", "rank", "dtype")}
    reference = work_of(argparse.Namespace(**{**vars(parser.parse_args([])), **flags, "devices": 1}))
    values = {axis: getattr(reference, axis, reference.config["num_hidden_layers"]) for axis in AXES}
    found = []
    for axis in AXES:
        for value in sorted({max(1, round(values[axis] * factor)) for factor in FACTORS}):
            layers = value if axis == "layers" else values["layers"]
            config = {**reference.config, "num_hidden_layers": layers}
            changed = {} if axis == "layers" else {axis: value}
            found.append((axis, value, dataclasses.replace(reference, config=config, **changed)))
    return found


def point(axis: str, value: int, work: Workload, steps: int, rounds: int) -> Point:
    """Measure one point."""
    found = measure_sides([OURS], work, steps, rounds, True)[OURS]
    memory = found["steps_bytes"] - found["before_bytes"] if found.get("steps_bytes") else found["peak_memory_bytes"]
    return Point(axis, value, quartiles(found["round_seconds"])[1], found["compile_seconds"], (memory or 0) / 1e9)


def table(points: Sequence[Point]) -> str:
    """The points as a Markdown table."""
    lines = ["| axis | value | step, ms | compile, s | memory, MB |", "| --- " * 5 + "|"]
    for p in points:
        lines.append(f"| {p.axis} | {p.value} | {1e3 * p.step:.1f} | {p.compile:.2f} | {1e3 * p.memory:.0f} |")
    return "\n".join(lines) + "\n"


def figure(points: Sequence[Point], title: str) -> Any:
    """The plot: one column per axis, one row per entry of :data:`PANELS`; all axes start at zero."""
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
        ax.set_xlabel({"batch": "rows", "length": "tokens per row"}.get(axis, axis))
    made.suptitle(title, fontsize=10)
    return made


def bench(given: argparse.Namespace) -> None:
    """Measure all points, print the table, and write ``curves.md``, ``curves.json`` and ``curves.png``."""
    if not given.output.parent.is_dir():
        raise InputError(f"--output: directory {given.output.parent} does not exist: create it first")
    if min(given.steps, given.rounds) < 1:
        raise InputError("--steps and --rounds must be at least 1")
    for name in ("curves.md", "curves.json", "curves.png"):
        require_new(given.output / name)
    todo = workloads(given)
    given.output.mkdir(exist_ok=True)
    points: list[Point] = []
    for number, (axis, value, work) in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {axis} {value}", file=sys.stderr)
        points.append(point(axis, value, work, given.steps, given.rounds))
    text = table(points)
    title = f"{given.shape}, {given.batch} x {given.length} tokens, r={given.rank}, all-linear, {given.dtype}"
    title += "; one axis varies, the others are fixed"
    print(f"{title}\n\n{text}", end="")
    write_new(given.output / "curves.md", f"{title}\n\n{text}".encode())
    write_new(given.output / "curves.json", (json.dumps([p._asdict() for p in points]) + "\n").encode())
    picture = io.BytesIO()
    figure(points, title).savefig(picture, format="png", dpi=120)
    write_new(given.output / "curves.png", picture.getvalue())
