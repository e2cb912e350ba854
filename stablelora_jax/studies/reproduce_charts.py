"""The charts of the page of a study; each drawing function draws into the axes that it is given.

A method has the same colour in all charts: Okabe and Ito's, which readers with any form of colour blindness tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stablelora_jax.runs import panels, ratio_panel
from stablelora_jax.runs.curves import Curves, read_curves
from stablelora_jax.runs.report_charts import Chart, chart
from stablelora_jax.studies import width_charts

Row = Mapping[str, Any]
WIDTHS = ("early", "late-ratio", "ratio-adam", "ratio-shrink")  # of width_charts
OTHERS = (panels.GREEN, panels.PURPLE, panels.ORANGE, panels.SKY, panels.GRAY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_TICKS = 7


def styles(results: Row) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method."""
    preset = results["settings"]["preset"]
    first = {preset["baseline"]: panels.BLUE, preset["method"]: panels.VERMILLION}
    rest = [name for name in preset["methods"] if name not in first]
    colors = first | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}
    return {name: (colors[name], MARKERS[i % len(MARKERS)]) for i, name in enumerate(preset["methods"])}


def factor(results: Row) -> tuple[float, str]:
    """What values are multiplied by, and the label of their axis."""
    return (100.0, "accuracy, %") if results["settings"]["preset"]["metric"] == "acc" else (1.0, "nats per token")


def widths(found: Row) -> list[Chart]:
    """The charts of the study of widths that say most."""
    return [one for one in width_charts.charts(found) if one.id.removeprefix("width-") in WIDTHS]


def learning_rates(results: Row) -> list[Chart]:
    """A chart for each task: the metric against the learning rate."""
    seen = "Mean over the seeds that choose the rate; vertical lines: one standard deviation. Rings: the best rate."
    return [
        chart(f"rates-{task}", f"Learning rates, {task}", seen, partial(_rates, results=results, task=task))
        for task in results["settings"]["preset"]["tasks"]
    ]


def _rates(axes: Any, results: Row, task: str) -> None:
    times, label = factor(results)
    shown = styles(results)
    ticks: set[float] = set()
    for row in (row for row in results["methods"] if row["task"] == task):
        color, marker = shown[row["method"]]
        points = [(one["rate"], one["mean"], one["std"]) for one in row["rates"] if one["mean"] is not None]
        ticks |= {one["rate"] for one in row["rates"]}
        _curve(axes, points, times, color, marker, row["method"])
        best = next((mean for rate, mean, _ in points if rate == row["rate"]), None)
        if best is not None:
            axes.plot([row["rate"]], [times * best], "o", color=color, markersize=12, fillstyle="none", linewidth=0)
    _log_x(axes, sorted(ticks), "learning rate")
    axes.set(ylabel=label)
    axes.grid(alpha=0.3)


def _curve(
    axes: Any, points: Sequence[Any], times: float, color: str, marker: str, label: str, style: str = "-"
) -> None:
    """Means with a marker each, and a vertical line of one standard deviation up and down."""
    if not points:
        return
    x, mean = [point[0] for point in points], times * np.array([point[1] for point in points])
    std = times * np.array([point[2] or 0 for point in points])
    axes.plot(x, mean, style, marker=marker, markersize=5, color=color, label=label)
    axes.vlines(x, mean - std, mean + std, color=color, alpha=0.5, linewidth=1)


def _log_x(axes: Any, ticks: Sequence[float], label: str) -> None:
    from matplotlib.ticker import NullLocator

    axes.set(xscale="log", xlabel=label)
    chosen = ticks[:: max(1, -(-len(ticks) // MOST_TICKS))]
    axes.set_xticks(chosen, [f"{tick:g}" for tick in chosen])
    axes.xaxis.set_minor_locator(NullLocator())


def seeds(results: Row) -> list[Chart]:
    """A chart for each task: every seed of every method at its best learning rate."""
    seen = "Points: seeds; bars: their mean. Where the points of two methods mix, their difference may be chance."
    return [
        chart(
            f"seeds-{task}",
            f"Seeds at the best learning rate, {task}",
            seen,
            partial(_seeds, results=results, task=task),
        )
        for task in results["settings"]["preset"]["tasks"]
    ]


def _seeds(axes: Any, results: Row, task: str) -> None:
    times, label = factor(results)
    shown, names = styles(results), []
    for at, row in enumerate(row for row in results["methods"] if row["task"] == task):
        color, marker = shown[row["method"]]
        values = [times * value for value in row["runs"].values() if value is not None]
        axes.plot(
            at + 0.12 * np.linspace(-1, 1, len(values)),
            values,
            marker,
            color=color,
            markersize=6,
            alpha=0.7,
            linestyle="",
        )
        if row["mean"] is not None:
            axes.plot([at - 0.25, at + 0.25], [times * row["mean"]] * 2, color=color, linewidth=2)
        names.append(row["method"].replace("-", "-\n") if len(row["method"]) > 9 else row["method"])
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=label, xlim=(-0.6, len(names) - 0.4))
    axes.grid(alpha=0.3, axis="y")


def shrink_ratios(results: Row) -> list[Chart]:
    """The metric against the shrink ratio."""
    seen = (
        "Mean over the seeds, vertical lines: one standard deviation. The dashed line is a ratio of 0. "
        "Without the stop rule A shrinks to the end."
    )
    return [chart("shrink", "Shrink ratio and stop rule", seen, partial(_shrink, results=results))]


def _shrink(axes: Any, results: Row) -> None:
    times, label = factor(results)
    rows = [row for row in results["shrink_ratios"] if row["mean"] is not None]
    ticks = sorted({row["shrink_ratio"] for row in rows if row["shrink_ratio"]})
    for stop, color, marker, style in ((True, panels.VERMILLION, "o", "-"), (False, panels.PURPLE, "s", ":")):
        own = [r for r in rows if r["shrink_ratio"] and r["stop_rule"] == stop]
        name = "with the stop rule" if stop else "without the stop rule"
        _curve(axes, [(r["shrink_ratio"], r["mean"], r["std"]) for r in own], times, color, marker, name, style)
    for row in rows:
        if not row["shrink_ratio"]:
            axes.axhline(times * row["mean"], color=panels.BLUE, linestyle="--", linewidth=1.2, label="ratio 0")
    _log_x(axes, ticks, "shrink ratio")
    axes.set(ylabel=label)
    axes.grid(alpha=0.3)


def ranks(results: Row) -> list[Chart]:
    """The metric against the rank."""
    seen = "Full lines: LoRA's scale, alpha / r. Dotted: rsLoRA's, alpha / sqrt(r). Vertical: one standard deviation."
    return [chart("ranks", "Ranks, LoRA and rsLoRA", seen, partial(_ranks, results=results))]


def _ranks(axes: Any, results: Row) -> None:
    times, label = factor(results)
    shown = styles(results)
    for method in dict.fromkeys(row["method"] for row in results["ranks"]):
        for scaling, style in (("lora", "-"), ("rslora", ":")):
            own = [r for r in results["ranks"] if (r["method"], r["scaling"]) == (method, scaling)]
            points = [(r["rank"], r["mean"], r["std"]) for r in own if r["mean"] is not None]
            name = f"{method}, {'LoRA' if scaling == 'lora' else 'rsLoRA'}"
            _curve(axes, points, times, *shown[method], name, style)
    _log_x(axes, sorted({row["rank"] for row in results["ranks"]}), "rank")
    axes.set(ylabel=label)
    axes.grid(alpha=0.3)


def terms(results: Row, output: Path) -> list[Chart]:
    """Of baseline and method: the stop rule's ratio by layer, the norms, and the terms of a step."""
    read = {name: read_curves(output / "runs" / run) for name, run in results["terms"].items()}
    made = []
    for key, title, draw in (
        ("ratio", "(||A|| / in) / (||B|| / out) by layer", ratio_panel.ratio),
        ("norms", "Norms of A and B", panels.norms),
        ("terms", "Terms of a step at the modules' outputs", panels.terms),
    ):
        for name, curves in read.items():
            made.append(chart(f"{key}-{name}", f"{title}, {name}", _seen(key, curves), partial(draw, curves=curves)))
    return made


def _seen(key: str, curves: Curves) -> str:
    if key == "ratio":
        return ratio_panel.caption(curves)
    if key == "norms":
        stops = " Vertical lines: a pair stops shrinking." if curves.stops else ""
        return "Lines: mean over the pairs; bands: least to greatest." + stops
    return (
        "Delta1 far above delta2: B learns alone. The shrink's own term ends where a pair stops. "
        "Lines: geometric mean over the pairs; bands: least to greatest."
    )
