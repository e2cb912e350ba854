"""What training on one task does to others: their accuracies with the adapters of baseline and method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stablelora_jax.evaluation.tasks import EvalModel, measure, subject
from stablelora_jax.interop.peft import load_peft
from stablelora_jax.lora.apply import adapted
from stablelora_jax.runs.files import ADAPTER, has_adapter
from stablelora_jax.runs.prepare import load_base
from stablelora_jax.studies.comparison import seeds_of
from stablelora_jax.studies.preset import Study
from stablelora_jax.studies.significance import mean_std


def forgetting(
    study: Study, rates: Mapping[str, float], log_fn: Callable[[str], None], kept: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """A row for each task and method: accuracy ``before`` training, and mean, deviation and runs after it.

    Args:
      study: its ``forgetting`` names the tasks.
      rates: the learning rate of each method.
      log_fn: takes lines of text.
      kept: accuracies by run and task that are known already; new ones are added ("" is the base).
    """
    preset = study.preset
    points = {m: seeds_of(study, study.task, m, rates[m]) for m in (preset.baseline, preset.method)}
    base = load_base(points[preset.method][0].config)

    def evaluated(name: str) -> dict[str, float]:
        if name not in kept:
            log_fn(f"other tasks: {name or 'the base'}")
            kept[name] = _accuracies(study, _subject(study, base, name))
        return kept[name]

    before = evaluated("")
    after = {
        m: {p.name: evaluated(p.name) for p in own if has_adapter(study.output / "runs" / p.name)}
        for m, own in points.items()
    }
    rows = []
    for task in preset.forgetting:
        for method, own in after.items():
            values = {name: found[task] for name, found in own.items()}
            mean, std = mean_std(list(values.values()))
            rows.append(
                {"task": task, "method": method, "before": before[task], "mean": mean, "std": std, "runs": values}
            )
    return rows


def _subject(study: Study, base: Any, name: str) -> EvalModel:
    """The base, or with the adapter of a run."""
    if not name:
        return subject(base.model, {"params": base.params})
    adapters, spec = load_peft(study.output / "runs" / name / ADAPTER, base.params)
    return subject(adapted(base.model, spec), {"params": base.params, "lora": adapters})


def _accuracies(study: Study, one: EvalModel) -> dict[str, float]:
    preset = study.preset
    found = {task: measure(one, task, study.data, limit=preset.forgetting_limit) for task in preset.forgetting}
    return {task: float(result.summary["acc"]) for task, result in found.items()}
