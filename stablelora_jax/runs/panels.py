"""The charts of a run, each drawn into given axes: shared by the PNGs and by the page of a run.

Colours are those of Okabe and Ito, which readers with any form of colour blindness tell apart; the layers of a model
take steps of viridis, whose lightness rises with the layer. No curve is told from another by red against green.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stablelora_jax.runs.curves import Curves

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
GRAY = "#767676"
RUNS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)  # one a run, then again with another line style
STYLES = ("-", "--", ":", "-.")
MOST_STOP_LINES = 24
MOST_POINTS = 600  # of a curve; more of them only make the file larger


def loss(axes: Any, curves: Curves) -> None:
    """Training loss of each step and smoothed, held-out loss, and the steps that were skipped."""
    values = curves.series["loss"]
    axes.plot(*thin(curves.steps, values), color=BLUE, alpha=0.4, linewidth=0.8, label="each step")
    axes.plot(*thin(curves.steps, smooth(values)), color=BLUE, label="smoothed")
    if curves.evaluations:
        axes.plot(*columns(curves.evaluations), "o", color=VERMILLION, markersize=5, label="validation")
    if curves.skipped:
        low, label = [0.02] * len(curves.skipped), f"skipped ({len(curves.skipped)})"
        axes.plot(curves.skipped, low, "x", color=PURPLE, transform=axes.get_xaxis_transform(), label=label)
    axes.set(xlabel="step", ylabel="nats per token", yscale=scale([*values, *(v for _, v in curves.evaluations)]))
    plain_log_ticks(axes)
    axes.grid(alpha=0.3)


def norms(axes: Any, curves: Curves) -> None:
    """Frobenius norms of A and B: the mean over the pairs, bands to the least and greatest; lines where pairs stop."""
    for letter, color, style in (("a", ORANGE, "-"), ("b", BLUE, "--")):
        mean, low, high = (curves.series[f"norm_{letter}{end}"] for end in ("", "_min", "_max"))
        axes.plot(*thin(curves.steps, mean), style, color=color, label=f"||{letter.upper()}||, mean")
        axes.fill_between(*thin(curves.steps, low, high), color=color, alpha=0.18, linewidth=0)
    _stop_lines(axes, curves)
    axes.set(xlabel="step", ylabel="Frobenius norm", ylim=(0, None))
    axes.grid(alpha=0.3)


def _stop_lines(axes: Any, curves: Curves) -> None:
    """A thin line at each step at which pairs stop shrinking; where there are many, the span of these steps."""
    steps = sorted({step for step, _ in curves.stops})
    if len(steps) > MOST_STOP_LINES:
        axes.axvspan(steps[0], steps[-1], color=VERMILLION, alpha=0.1, linewidth=0, label="pairs stop shrinking")
        return
    for i, step in enumerate(steps):
        label = None if i else "a pair stops shrinking"
        axes.axvline(step, color=VERMILLION, alpha=0.35, linewidth=0.7, label=label)


def terms(axes: Any, curves: Curves) -> None:
    """RMS of what a step changes at the modules' outputs: geometric mean over the pairs, bands to the extremes."""
    for field, label, color in (
        ("delta1", "delta1 = s z A' dB", ORANGE),
        ("delta2", "delta2 = s z dA B", BLUE),
        ("delta3", "delta3 = s z dA dB", PURPLE),
        ("shrink", "shrink = s z (A' - A) B", GRAY),
    ):
        _band(axes, curves, field, label, color)
    low, high = axes.get_ylim()
    axes.set(xlabel="step", ylabel="RMS", ylim=(max(low, high * 1e-8), high))  # a rate of zero would stretch the axis
    plain_log_ticks(axes)


def widths(axes: Any, curves: Curves) -> None:
    """Both sides of the stop rule: ||A|| / in and ||B|| / out, geometric mean over the pairs."""
    for field, label, color in (("a", "||A|| / in", ORANGE), ("b", "||B|| / out", BLUE)):
        _band(axes, curves, field, label, color)
    axes.set(xlabel="step", ylabel="norm over width")
    plain_log_ticks(axes)


def _band(axes: Any, curves: Curves, field: str, label: str, color: str) -> None:
    """One term over the pairs against the step, on a log axis; a pair where it is zero or null has no point."""
    rows = [(step, [t[field] for t in terms.values() if (t.get(field) or 0) > 0]) for step, terms in curves.stability]
    steps, values = [step for step, row in rows if row], [row for _, row in rows if row]
    if not steps:
        return
    means = [math.exp(sum(map(math.log, row)) / len(row)) for row in values]
    lows, highs = [min(row) for row in values], [max(row) for row in values]
    marker = "." if len(steps) < 60 else None
    axes.plot(*thin(np.array(steps), means), color=color, label=label, marker=marker)
    axes.fill_between(*thin(np.array(steps), lows, highs), color=color, alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def plain_log_ticks(axes: Any) -> None:
    """On a log axis 0.5, 1, 2, 5, 10 instead of powers of ten; over more than two decades 0.1, 1, 10."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if axes.get_yscale() != "log":
        return
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if decades <= 2 else (1,), numticks=8))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def run_styles() -> Any:
    """A colour for each of several runs; once they are used up, the same ones with another line style."""
    from cycler import cycler

    return cycler(linestyle=STYLES) * cycler(color=RUNS)


def columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """(step, value) pairs as two lists."""
    return [x for x, _ in points], [y for _, y in points]


def scale(losses: Iterable[float]) -> str:
    """Log where every finite loss is above zero."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return "log" if finite and min(finite) > 0 else "linear"


def smooth(values: Iterable[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average with the start corrected, as TensorBoard draws it; NaN changes nothing."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def thin(steps: np.ndarray, *curves: Any) -> tuple[np.ndarray, ...]:
    """At most :data:`MOST_POINTS` of the points: of each group the one where the first curve is least or greatest.

    So a spike that lasts one step stays in the picture, and so does a gap that fills a group.
    """
    arrays = [np.asarray(curve, float) for curve in curves]
    if len(steps) <= MOST_POINTS:
        return (steps, *arrays)
    groups = np.array_split(np.arange(len(steps)), MOST_POINTS // 2)
    first = arrays[0]
    ends = {
        int(group[pick(first[group])]) if np.isfinite(first[group]).any() else int(group[0])
        for group in groups
        for pick in (np.nanargmin, np.nanargmax)
    }
    kept = np.array(sorted(ends | {0, len(steps) - 1}))
    return (steps[kept], *(array[kept] for array in arrays))
