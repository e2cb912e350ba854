"""Pictures of a run, drawn from its ``metrics.jsonl`` alone: the loss, and the norms that Stable-LoRA balances."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablelora_jax.metrics import read_records


def draw(directory: str | Path) -> list[Path]:
    """Draw ``loss.png`` and ``norms.png`` into the run directory; gives the paths, or none without records."""
    directory = Path(directory)
    records = [record for record in read_records(directory / "metrics.jsonl") if "loss" in record]
    if not records:
        return []
    return [_loss(records, directory / "loss.png"), _norms(records, directory / "norms.png")]


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
