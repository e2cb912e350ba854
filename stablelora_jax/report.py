"""Pictures of a run, drawn from its ``metrics.jsonl`` alone: the loss, the norms that Stable-LoRA balances, and, where
they were measured, the terms of its stability analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablelora_jax.metrics import read_records


def draw(directory: str | Path) -> list[Path]:
    """Draw ``loss.png``, ``norms.png`` and, where a record has the terms, ``stability.png`` into the run directory.

    Gives the paths, or none without records.
    """
    directory = Path(directory)
    records = [record for record in read_records(directory / "metrics.jsonl") if "loss" in record]
    if not records:
        return []
    paths = [_loss(records, directory / "loss.png"), _norms(records, directory / "norms.png")]
    measured = [record for record in records if "stability" in record]
    return paths + ([_stability(measured, directory / "stability.png")] if measured else [])


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    return figure, axes


def _loss(records: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure("Loss on the answer tokens")
    steps, loss = [r["step"] for r in records], [r["loss"] for r in records]
    axes.plot(steps, loss, color="tab:blue", alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, _smooth(loss), color="tab:blue", label="smoothed")
    axes.set(ylabel="nats per token", yscale="log" if min(loss) > 0 else "linear")
    rate = axes.twinx()
    rate.plot(steps, [r["learning_rate"] for r in records], color="tab:gray", linestyle=":", label="learning rate")
    rate.set_ylabel("learning rate")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    return path


def _norms(records: Sequence[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure("Frobenius norms of the pairs, and when each became stable")
    steps = [r["step"] for r in records]
    for letter, color in (("a", "tab:orange"), ("b", "tab:green")):
        axes.plot(steps, [r[f"norm_{letter}"] for r in records], color=color, label=f"||{letter.upper()}||, mean")
        low, high = ([r[f"norm_{letter}_{end}"] for r in records] for end in ("min", "max"))
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    stops = sorted((record["step"], name) for record in records for name in record.get("stopped", ()))
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
    figure.savefig(path, dpi=120)
    return path


def _stability(records: Sequence[dict[str, Any]], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for field, label, color in (
        ("delta1", "delta1 = s z A' dB", "tab:orange"),
        ("delta2", "delta2 = s z dA B", "tab:green"),
        ("delta3", "delta3 = s z dA dB", "tab:purple"),
        ("shrink", "shrink = s z (A' - A) B", "tab:gray"),
    ):
        _band(upper, records, field, label, color)
    for field, label, color in (("a", "||A|| / in", "tab:orange"), ("b", "||B|| / out", "tab:green")):
        _band(lower, records, field, label, color)
    upper.set(title="What a step changes: geometric mean over the pairs, bands to the least and greatest", ylabel="RMS")
    lower.set(xlabel="step", ylabel="norm over width")
    figure.savefig(path, dpi=120)
    return path


def _band(axes: Any, records: Sequence[dict[str, Any]], field: str, label: str, color: str) -> None:
    """One term over the pairs against the step, on a log axis; where it is zero at every pair there is no point."""
    rows = [(r["step"], [t[field] for t in r["stability"].values() if t[field] > 0]) for r in records]
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


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average with the start corrected, as TensorBoard draws it."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
