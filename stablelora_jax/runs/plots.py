"""Pictures of runs, drawn from their ``metrics.jsonl`` alone, at any time: the loss, the norms that Stable-LoRA
balances, where they were measured the terms of its stability analysis, and the losses of several runs in one.

``python -m stablelora_jax.runs.plots RUN [RUN ...] [--output DIR]``
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stablelora_jax.runs.cli import exit_code
from stablelora_jax.runs.curves import Curves, labels, read_curves
from stablelora_jax.runs.files import METRICS, SOFTWARE, is_picture
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, write_bytes_whole, writing


@checked
def draw(directory: str | Path, output: str | Path | None = None) -> list[Path]:
    """Draw ``loss.png``, ``norms.png`` and, where a record has the terms, ``stability.png``.

    Args:
      directory: of a run.
      output: a directory for the pictures, made if needed; that of the run unless given.

    Returns:
      The paths, or none without records.

    Raises:
      InputError: a picture of that name is there that was not drawn from a run: nothing is replaced.
      RunError: they cannot be written.
    """
    directory = as_path(directory, "a run")
    curves, output = read_curves(directory), as_path(output or directory, "--output")
    if not len(curves.steps):
        return []
    kinds = {"loss.png": _loss, "norms.png": _norms} | ({"stability.png": _stability} if curves.stability else {})
    for name in kinds:
        _require_picture(output / name)
    return [_save(make(curves), output / name) for name, make in kinds.items()]


def draw_together(directories: Sequence[str | Path], output: str | Path) -> Path:
    """Draw ``losses.png`` into the directory ``output``: the losses of several runs, smoothed, and their validation.

    A run is called by the keys of its configuration that tell it from the others, or by its directory.

    Raises:
      RunError: it cannot be written.
    """
    figure, axes = _figure("Loss on the answer tokens, smoothed; points: on held-out data")
    every = []
    for name, curves in zip(labels([Path(d) for d in directories]), map(read_curves, directories), strict=True):
        (line,) = axes.plot(curves.steps, _smooth(curves.series["loss"]), label=name)
        axes.plot(*_columns(curves.evaluations), "o", markersize=4, color=line.get_color())
        every += [*_smooth(curves.series["loss"]), *(loss for _, loss in curves.evaluations)]
    axes.set(ylabel="nats per token", yscale=_scale(every))
    figure.legend(loc="outside lower center", fontsize=8)
    return _save(figure, as_path(output, "--output") / "losses.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m stablelora_jax.runs.plots", description="Draw the pictures of runs, also while they go on."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run directory of experiments/train.py")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="directory of the pictures of one run (default: the run's) or of losses.png of several (default: here)",
    )
    given = parser.parse_args(argv)
    return exit_code(lambda: report(given.runs, given.output))


def report(runs: Sequence[Path], output: Path | None = None) -> None:
    """Redraw the pictures of each run and, of several, ``losses.png`` in ``output``; say where they are.

    Raises:
      InputError: a directory that is no run, or has logged no step yet.
      RunError: a picture cannot be written.
    """
    runs = [as_path(run, "a run") for run in runs]
    if output is not None and as_path(output, "--output").exists() and not as_path(output).is_dir():
        raise InputError(f"--output {output} is no directory: name another one")
    if len(runs) > 1:
        _require_picture(as_path(output or ".", "--output") / "losses.png")
    for run in runs:
        if not run.is_dir():
            raise InputError(f"there is no run directory {run}")
        if not (run / METRICS).is_file():
            raise InputError(f"{run} has no {METRICS}: it is no run directory, or its run has not begun")
        if not len(read_curves(run).steps):
            raise InputError(f"{run / METRICS} holds no step yet")
    pictures = [path for run in runs for path in draw(run, output if len(runs) == 1 else None)]
    if len(runs) > 1:
        pictures.append(draw_together(runs, output or Path(".")))
    for path in pictures:
        print(path)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _scale(losses: Iterable[float]) -> str:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return "log" if finite and min(finite) > 0 else "linear"


def _save(figure: Any, path: Path) -> Path:
    """Write the picture in one step, so that who looks at it while a run draws sees a whole one.

    Raises:
      InputError: something that is no picture of a run is there.
    """
    _require_picture(path)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": SOFTWARE})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_whole(path, content.getvalue())
    return path


def _require_picture(path: Path) -> None:
    if not is_picture(path):
        raise InputError(f"{path} was not drawn from a run: move it, or name another directory with --output")


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    return figure, axes


def _loss(curves: Curves) -> Any:
    figure, axes = _figure("Loss on the answer tokens")
    loss = curves.series["loss"]
    axes.plot(curves.steps, loss, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axes.plot(curves.steps, _smooth(loss), color="tab:blue", label="smoothed")
    if curves.evaluations:
        axes.plot(*_columns(curves.evaluations), "o", color="tab:orange", markersize=5, label="validation")
    if curves.skipped:
        low, label = [0.02] * len(curves.skipped), f"skipped ({len(curves.skipped)})"
        axes.plot(curves.skipped, low, "x", color="tab:red", transform=axes.get_xaxis_transform(), label=label)
    axes.set(ylabel="nats per token", yscale=_scale([*loss, *(value for _, value in curves.evaluations)]))
    rate = axes.twinx()
    rate.plot(curves.steps, curves.series["learning_rate"], color="tab:gray", linestyle=":", label="learning rate")
    rate.set_ylabel("learning rate")
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def _norms(curves: Curves) -> Any:
    figure, axes = _figure("Frobenius norms of the pairs, and when each became stable")
    for letter, color in (("a", "tab:orange"), ("b", "tab:green")):
        mean, low, high = (curves.series[f"norm_{letter}{end}"] for end in ("", "_min", "_max"))
        axes.plot(curves.steps, mean, color=color, label=f"||{letter.upper()}||, mean")
        axes.fill_between(curves.steps, low, high, color=color, alpha=0.15, linewidth=0)
    stops = sorted(curves.stops)
    for step, _ in stops:
        axes.axvline(step, color="tab:red", alpha=0.4, linewidth=0.8)
    if stops:
        axes.axvline(stops[0][0], color="tab:red", alpha=0.4, linewidth=0.8, label="a pair stops shrinking")
    if 0 < len(stops) <= 24:
        top = axes.get_ylim()[1]
        for i, (step, name) in enumerate(stops):
            axes.text(step, top * (0.98 - 0.035 * i), _short(name), fontsize=6, va="top")
    axes.set(ylabel="norm", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _stability(curves: Curves) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for field, label, color in (
        ("delta1", "delta1 = s z A' dB", "tab:orange"),
        ("delta2", "delta2 = s z dA B", "tab:green"),
        ("delta3", "delta3 = s z dA dB", "tab:purple"),
        ("shrink", "shrink = s z (A' - A) B", "tab:gray"),
    ):
        _band(upper, curves, field, label, color)
    for field, label, color in (("a", "||A|| / in", "tab:orange"), ("b", "||B|| / out", "tab:green")):
        _band(lower, curves, field, label, color)
    upper.set(title="What a step changes: geometric mean over the pairs, bands to the least and greatest", ylabel="RMS")
    lower.set(xlabel="step", ylabel="norm over width")
    return figure


def _band(axes: Any, curves: Curves, field: str, label: str, color: str) -> None:
    """One term over the pairs against the step, on a log axis; a pair where it is zero or null has no point."""
    rows = [(step, [t[field] for t in terms.values() if (t.get(field) or 0) > 0]) for step, terms in curves.stability]
    steps, values = [step for step, row in rows if row], [row for _, row in rows if row]
    if not steps:
        return
    means = [math.exp(sum(map(math.log, row)) / len(row)) for row in values]
    axes.plot(steps, means, color=color, label=label, marker="." if len(steps) < 60 else None)
    axes.fill_between(steps, [min(row) for row in values], [max(row) for row in values], color=color, alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _short(name: str) -> str:
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number} {parts[-1]}".strip()


def _smooth(values: Iterable[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average with the start corrected, as TensorBoard draws it; NaN changes nothing."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


if __name__ == "__main__":
    sys.exit(main())
