"""Pictures of runs, drawn from their ``metrics.jsonl`` alone, at any time: the loss, the norms that Stable-LoRA
balances, where they were measured the terms of its stability analysis, and the losses of several runs in one.

``python -m stablelora_jax.runs.plots RUN [RUN ...] [--output DIR]``
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablelora_jax.runs import panels, ratio_panel
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.runs.curves import Curves, labels, ratios_of, read_curves
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
    axes.set_prop_cycle(panels.run_styles())
    for name, curves in zip(labels([Path(d) for d in directories]), map(read_curves, directories), strict=True):
        shown = name.replace("$", r"\$")  # no formula
        (line,) = axes.plot(*panels.thin(curves.steps, panels.smooth(curves.series["loss"])), label=shown)
        axes.plot(*panels.columns(curves.evaluations), "o", markersize=4, color=line.get_color())
        every += [*panels.smooth(curves.series["loss"]), *(loss for _, loss in curves.evaluations)]
    axes.set(xlabel="step", ylabel="nats per token", yscale=panels.scale(every))
    panels.plain_log_ticks(axes)
    axes.grid(alpha=0.3)
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


def _figure(title: str, rows: Sequence[int] = (1,), size: tuple[float, float] = (8, 4.5)) -> tuple[Any, Any]:
    """A figure with one panel below another, of these relative heights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), sharex=True, height_ratios=rows)
    figure.suptitle(title)
    return figure, axes


def _loss(curves: Curves) -> Any:
    figure, axes = _figure("Loss on the answer tokens")
    panels.loss(axes, curves)
    rate = axes.twinx()
    rate.plot(curves.steps, curves.series["learning_rate"], color=panels.GRAY, linestyle=":", label="learning rate")
    rate.set_ylabel("learning rate")
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def _norms(curves: Curves) -> Any:
    if not len(ratios_of(curves).steps):  # a run of an older version
        figure, axes = _figure("Frobenius norms of the pairs, and when each became stable")
        panels.norms(axes, curves)
        figure.legend(loc="outside lower center", ncols=4)
        return figure
    figure, (upper, lower) = _figure("The pairs' norms, and the ratio that ends the shrinking of A", (2, 3), (9.5, 8))
    panels.norms(upper, curves)
    upper.set(xlabel=None)
    ratio_panel.ratio(lower, curves)
    for axes in (upper, lower):
        _legend(axes)
    figure.supxlabel(textwrap.fill(ratio_panel.caption(curves), 110), fontsize=9)
    return figure


def _stability(curves: Curves) -> Any:
    title = "What a step changes: geometric mean over the pairs, bands to the least and greatest"
    figure, (upper, lower) = _figure(title, (3, 2), (9.5, 7))
    panels.terms(upper, curves)
    panels.widths(lower, curves)
    upper.set(xlabel=None)
    for axes in (upper, lower):
        _legend(axes)
    return figure


def _legend(axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
