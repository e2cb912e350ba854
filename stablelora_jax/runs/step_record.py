"""The record of a training step, and the scalars of a record for trackers: pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.optimizers import still_shrinking
from stablelora_jax.runs.records import plain
from stablelora_jax.training.metrics import ratios_by_name
from stablelora_jax.training.stability import Stability, by_name

# recorded in another form, or not
NOT_RECORDED = ("applied", "skipped", "consecutive_skips", "latches", "stability", "stop_ratios")
EVALUATION_SCALARS = ("loss", "acc", "acc_norm")


def step_record(
    step: int,
    metrics: Mapping[str, Any],
    spec: LoraSpec,
    *,
    learning_rate: float,
    seconds: float,
    stopped: Collection[str] = (),
) -> dict[str, Any]:
    """The record of step number ``step`` (from 1).

    Args:
      step: its number.
      metrics: as :func:`stablelora_jax.training.step.make_train_step` returns them, on the host; with ``stability`` as
        :func:`stablelora_jax.training.step.make_stability_view` returns it, its terms are in the record, by module.
      spec: of the adapters.
      learning_rate: of this step.
      seconds: since the record before; gives ``tokens_per_second``.
      stopped: names of the pairs that had stopped shrinking before this step; those that stop now are listed.
    """
    scalars = {name: float(value) for name, value in metrics.items() if name not in NOT_RECORDED}
    tokens = scalars.pop("tokens")
    latches = still_shrinking(metrics["latches"], spec.stacked) if metrics["latches"] else {}
    record: dict[str, Any] = {"step": step, **scalars, "learning_rate": learning_rate}
    record |= {"tokens_per_second": tokens / max(seconds, 1e-9), "shrinking": sum(latches.values())}
    if metrics.get("skipped", 0):
        record["skipped"] = True
    if new := sorted(name for name, on in latches.items() if not on and name not in stopped):
        record["stopped"] = new
    if "stop_ratios" in metrics and has_ratios(step):
        record["stop_ratios"] = {n: float(f"{x:.5g}") for n, x in ratios_by_name(metrics["stop_ratios"], spec).items()}
    terms = by_name(metrics["stability"], spec) if "stability" in metrics else {}
    if terms:
        record["stability"] = {n: t | ({"shrinking": latches[n]} if n in latches else {}) for n, t in terms.items()}
    return record


def has_ratios(step: int) -> bool:
    """Whether the ratios of all pairs are recorded at a step: the first 200, then every 10th, from 2000 every 100th...

    Example::

      >>> [step for step in range(196, 225) if has_ratios(step)]
      [196, 197, 198, 199, 200, 210, 220]
    """
    interval = 1
    while step >= 200 * interval:
        interval *= 10
    return step % interval == 0


def tracker_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite scalars of a record by tracker name: ``train/...``, ``validation/...``, ``stability/...`` (means).

    Example::

      >>> tracker_scalars({"step": 3, "loss": 2.0, "gradient_norm": float("inf")})
      {'train/loss': 2.0}
      >>> tracker_scalars({"step": 3, "validation": {"loss": 1.5, "answers": [0, 2]}})
      {'validation/loss': 1.5}
    """
    validation, terms = record.get("validation", {}), record.get("stability", {})
    scalars = {f"train/{key}": x for key, x in record.items() if key != "step" and isinstance(x, int | float)}
    scalars |= {f"validation/{key}": validation[key] for key in EVALUATION_SCALARS if key in validation}
    if terms:
        means = {name: sum(t[name] for t in terms.values()) / len(terms) for name in Stability._fields}
        scalars |= {f"stability/{name}": mean for name, mean in means.items()}
    return {name: float(value) for name, value in scalars.items() if plain(float(value)) is not None}
