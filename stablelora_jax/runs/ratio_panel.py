"""The chart of Stable-LoRA's stop rule: (||A||_F / in) / (||B||_F / out) of every pair against the step.

The ratio starts at infinity, since B is zero, and falls. Where it reaches 1, the pair's latch falls and A shrinks no
more (arXiv 2603.05204, section 4).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stablelora_jax.runs.curves import Curves, Ratios, ratios_of
from stablelora_jax.runs.panels import BLUE, GRAY, ORANGE, PURPLE, VERMILLION, plain_log_ticks, thin

SEQUENCE = ("#440154", "#3b528b", "#21918c", "#35b779", "#90c63b")  # steps of viridis, dark to light
MOST_LINES = 40  # of more pairs, quantiles are drawn and three pairs
TOP = 30.0  # the axis ends here at the latest, since the ratio begins at infinity


def ratio(axes: Any, curves: Curves) -> None:
    """Every pair's ratio on a log axis with the line at 1, and where each pair stops shrinking.

    Up to 40 pairs are lines coloured by layer. Of more, the quantiles are drawn, and the pairs that stop first, in the
    median and last; without a stop, those that end lowest, in the median and highest.
    """
    found = _thinner(ratios_of(curves))
    if len(found.names) > MOST_LINES:
        _quantiles(axes, found)
        _highlights(axes, found, curves)
    else:
        _by_layer(axes, found)
    axes.axhline(1, color=GRAY, linewidth=1.2, linestyle="--", label="ratio 1: shrinking stops")
    steps = [step for step, _ in curves.stops]
    if steps:
        label = f"a pair stops ({len(steps)})"
        dot = {"marker": "o", "markersize": 4.5} if len(steps) <= MOST_LINES else {"marker": "|", "markersize": 9}
        axes.plot(steps, [1] * len(steps), color=VERMILLION, linestyle="", alpha=0.75, label=label, **dot)
    axes.set(xlabel="step", ylabel="(||A|| / in) / (||B|| / out)", yscale="log", ylim=limits(found.values))
    plain_log_ticks(axes)
    axes.grid(alpha=0.3)


def caption(curves: Curves) -> str:
    """What the chart shows, in words."""
    pairs = len(ratios_of(curves).names) or len(curves.stops)
    if not curves.has_stop_rule:
        return (
            "This optimizer has no stop rule. Above 1, A is large relative to B, and changes of B dominate what a step "
            "does."
        )
    steps = [step for step, _ in curves.stops]
    if not steps:
        return f"None of the {pairs} pairs has reached 1 so far: A still shrinks in each."
    ends = (
        f"at step {steps[0]}" if len(steps) == 1 else f"the first at step {min(steps)}, the last at step {max(steps)}"
    )
    return f"A shrinks until its pair's ratio falls to 1. {len(steps)} of {pairs} pairs have stopped, {ends}."


def limits(ratios: np.ndarray) -> tuple[float, float]:
    """Of the axis: all ratios but those near the beginning, where they come from infinity."""
    finite = ratios[np.isfinite(ratios)]
    if not finite.size:
        return 0.5, 10.0
    return min(0.8, float(finite.min()) / 1.2), max(1.5, min(TOP, float(finite.max()) * 1.2))


def quartiles(curves: Curves) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, lower quartile, median, upper quartile) over the pairs, (n,) each."""
    found = _thinner(ratios_of(curves))
    return (found.steps, _quantile(found, 0.25), _quantile(found, 0.5), _quantile(found, 0.75))


def short(name: str) -> str:
    """``3 q_proj`` for ``model.layers.3.self_attn.q_proj``."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number} {parts[-1]}".strip()


def _by_layer(axes: Any, found: Ratios) -> None:
    layers = [_layer(name) for name in found.names]
    known = sorted(set(layers))
    bins = np.array_split(known, min(len(known), len(SEQUENCE))) if known else []
    shades = np.linspace(0, len(SEQUENCE) - 1, len(bins)).round().astype(int)
    for shade, group in zip(shades, bins, strict=True):
        own = [i for i, layer in enumerate(layers) if layer in group]
        drawn = axes.plot(found.steps, found.values[:, own], color=SEQUENCE[shade], alpha=0.75, linewidth=1)
        drawn[0].set_label(_layers_text(int(group[0]), int(group[-1])))


def _quantiles(axes: Any, found: Ratios) -> None:
    for low, high, alpha in ((0.0, 1.0, 0.15), (0.25, 0.75, 0.3)):
        label = "all pairs" if low == 0 else "the middle half"
        ends = (_quantile(found, low), _quantile(found, high))
        axes.fill_between(found.steps, *ends, color=BLUE, alpha=alpha, linewidth=0, label=label)


def _highlights(axes: Any, found: Ratios, curves: Curves) -> None:
    when = {name: step for step, name in curves.stops}
    order = sorted((name for name in found.names if name in when), key=lambda name: when[name])
    kinds = ("first to stop", "median", "last to stop")
    if not order:
        last = np.nan_to_num(found.values[-1], nan=np.inf)
        order, kinds = [found.names[i] for i in np.argsort(last)], ("lowest", "median", "highest")
    picked = (order[0], order[len(order) // 2], order[-1])
    for kind, name, color, style in zip(kinds, picked, (ORANGE, GRAY, PURPLE), ("-", "--", "-."), strict=True):
        values = found.values[:, found.names.index(name)]
        axes.plot(found.steps, values, style, color=color, linewidth=1.6, label=f"{kind}: {short(name)}")


def _quantile(found: Ratios, share: float) -> np.ndarray:
    result = np.full(len(found.steps), np.nan)
    some = np.isfinite(found.values).any(axis=1)
    if some.any():
        result[some] = np.nanquantile(found.values[some], share, axis=1)
    return result


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _layers_text(first: int, last: int) -> str:
    if last < 0:
        return "outside the layers"
    return f"layer {first}" if first == last else f"layers {max(first, 0)} to {last}"


def _thinner(found: Ratios) -> Ratios:
    rows = thin(np.arange(len(found.steps)), _quantile(found, 0.5))[0]
    return Ratios(found.steps[rows], found.names, found.values[rows])
