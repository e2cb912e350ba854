"""The charts of the page of widths: each function draws into the axes that it is given.

``runs`` are those of ``results.json``. Colours are those of :mod:`stablelora_jax.runs.panels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stablelora_jax.runs.panels import BLUE, GRAY, GREEN, ORANGE, PURPLE, VERMILLION, plain_log_ticks, run_styles
from stablelora_jax.runs.ratio_panel import SEQUENCE
from stablelora_jax.studies.slopes import fit

Runs = Sequence[Mapping[str, Any]]
METHODS = {"Adam": (VERMILLION, "-", "o"), "Stable-LoRA": (BLUE, "--", "s"), "small A": (GREEN, ":", "^")}
DELTAS = {"delta1": (ORANGE, "-", "o"), "delta2": (BLUE, "--", "s"), "delta3": (PURPLE, ":", "^")}
MOST_WIDTHS = 4  # curves over steps in one chart
LEAST_SPAN = 6.0  # of a y axis, so that it has ticks of one digit
FIRST = 6  # points of a curve whose losses are of single batches


def deltas(axes: Any, runs: Runs, span: str) -> None:
    """Delta1, delta2 and delta3 of one config against the width."""
    for name, style in DELTAS.items():
        _power(axes, name, runs, lambda run, name=name: run["windows"][span][name], style)  # type: ignore[misc]
    _width_axis(axes, runs, "RMS of the change of the output")


def methods(axes: Any, groups: Mapping[str, Runs], span: str, quantity: str, ylabel: str) -> None:
    """One quantity against the width for each method of :data:`METHODS`."""
    for method, runs in groups.items():
        _power(axes, method, runs, lambda run: run["windows"][span][quantity], METHODS[method])
        _width_axis(axes, runs, ylabel)


def configs(axes: Any, groups: Mapping[str, Runs], span: str, quantity: str) -> None:
    """One quantity against the width for any configs."""
    styles = iter(run_styles())
    for name, runs in groups.items():
        style = next(styles)
        _power(axes, name, runs, lambda run: run["windows"][span][quantity], (style["color"], style["linestyle"], "o"))
        _width_axis(axes, runs, "RMS of the change of the output")


def stops(axes: Any, groups: Mapping[str, Runs]) -> None:
    """The step in which A stopped shrinking against the width: a point for each seed, a line through the means."""
    for (name, runs), color, style in zip(groups.items(), (BLUE, ORANGE, PURPLE), ("-", "--", ":"), strict=False):
        stopped = [run for run in runs if run["stop_step"] is not None]
        axes.plot([r["width"] for r in stopped], [r["stop_step"] for r in stopped], "o", color=color, markersize=4)
        widths = sorted({run["width"] for run in stopped})
        means = [np.mean([run["stop_step"] for run in stopped if run["width"] == width]) for width in widths]
        axes.plot(widths, means, style, color=color, label=name)
        _width_axis(axes, runs, "step in which A stops shrinking")


def ratios(axes: Any, runs: Runs, steps: Sequence[int], limits: tuple[float, float]) -> None:
    """Delta1 over delta2 against the step for some widths, with the steps in which A stopped shrinking."""
    for width, own, color in _by_width(runs):
        _over_steps(axes, steps, own, lambda run: _quotient(run["curves"], "delta1", "delta2"), color, f"n = {width}")
    axes.axhline(1, color=GRAY, linestyle="--", linewidth=1)
    _step_axis(axes, "delta1 / delta2", limits)


def overshoot(axes: Any, runs: Runs, reference: Runs, steps: Sequence[int]) -> None:
    """RMS of x A over that of runs whose A was small from the start, against the step for some widths."""
    beside = {(run["width"], run["seed"]): run["curves"]["az"] for run in reference}

    def over(run: Mapping[str, Any]) -> Any:
        return np.array(run["curves"]["az"]) / np.array(beside[run["width"], run["seed"]])

    for width, own, color in _by_width(runs):
        _over_steps(axes, steps, own, over, color, f"n = {width}")
    axes.axhline(1, color=GRAY, linestyle="--", linewidth=1, label="1: as from a small A")
    _step_axis(axes, "RMS(x A), relative to a small A", None)


def losses(axes: Any, groups: Mapping[tuple[str, float], Runs], steps: Sequence[int]) -> None:
    """The loss against the step; ``groups`` by method and e0, the greatest e0 as full lines."""
    styles = dict(zip(sorted({e0 for _, e0 in groups}, reverse=True), ("-", "--", ":"), strict=False))
    for (method, e0), runs in groups.items():
        curve = np.mean([run["curves"]["loss"] for run in runs], axis=0)
        label = f"{method}, e0 = {e0:g}"
        axes.plot(steps[FIRST:], curve[FIRST:], styles[e0], color=METHODS[method][0], label=label)
    axes.set(xlabel="step", ylabel="half of the mean square")
    axes.grid(alpha=0.3)


def _power(axes: Any, name: str, runs: Runs, value: Callable[[Any], float], style: tuple[str, str, str]) -> None:
    """Points of every run and the fitted power law, whose exponent the legend has."""
    color, line, marker = style
    widths, values = np.array([run["width"] for run in runs]), np.array([value(run) for run in runs])
    slope = fit(widths, values).slope
    ends = np.array([widths.min(), widths.max()])
    fitted = np.exp(np.log(values).mean() + slope * (np.log(ends) - np.log(widths).mean()))
    axes.plot(widths, values, marker, color=color, markersize=4, alpha=0.8)
    axes.plot(ends, fitted, line, color=color, label=f"{name}: slope {signed(slope)}")


def _over_steps(
    axes: Any, steps: Sequence[int], runs: Runs, value: Callable[[Any], Any], color: str, label: str
) -> None:
    """The geometric mean over seeds; a dot where the first of them stopped shrinking."""
    curve = np.exp(np.mean([np.log(value(run)[1:]) for run in runs], axis=0))  # in step 1 delta2 is zero
    axes.plot(steps[1:], curve, color=color, label=label)
    stop = runs[0]["stop_step"]
    if stop is not None:
        axes.plot([stop], [np.exp(np.interp(stop, steps[1:], np.log(curve)))], "o", color=color, markersize=6)


def _quotient(curves: Mapping[str, Any], over: str, under: str) -> Any:
    with np.errstate(divide="ignore"):
        return np.array(curves[over]) / np.array(curves[under])


def _by_width(runs: Runs) -> Iterator[tuple[int, Runs, str]]:
    """At most four widths, from least to greatest, with their runs and a colour each."""
    widths = sorted({run["width"] for run in runs})
    chosen = [widths[i] for i in np.unique(np.linspace(0, len(widths) - 1, MOST_WIDTHS).round().astype(int))]
    for width, color in zip(chosen, SEQUENCE, strict=False):
        yield width, [run for run in runs if run["width"] == width], color


def _width_axis(axes: Any, runs: Runs, ylabel: str) -> None:
    from matplotlib.ticker import NullLocator

    widths = sorted({run["width"] for run in runs})
    axes.set(xscale="log", yscale="log", xlabel="width n", ylabel=ylabel)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    margin = max(1.0, (LEAST_SPAN * low / high) ** 0.5)
    axes.set_ylim(low / margin, high * margin)
    plain_log_ticks(axes)
    axes.grid(alpha=0.3)


def _step_axis(axes: Any, ylabel: str, limits: tuple[float, float] | None) -> None:
    axes.set(xlabel="step", ylabel=ylabel, yscale="log", **({"ylim": limits} if limits else {}))
    plain_log_ticks(axes)
    axes.grid(alpha=0.3)


def signed(value: float, digits: int = 2) -> str:
    """``+0.98``, ``\N{MINUS SIGN}0.05``, or ``0.00`` without a sign."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "\N{MINUS SIGN}") if rounded else f"{0:.{digits}f}"
