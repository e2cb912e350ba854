"""What training on one task does to others: their accuracies with the adapters of baseline and method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from stablelora_jax.data.tasks import merged_qa
from stablelora_jax.evaluation.tasks import CHOICES, EvalModel, measure, subject
from stablelora_jax.interop.peft import load_peft
from stablelora_jax.lora.apply import adapted
from stablelora_jax.runs.files import ADAPTER, has_adapter
from stablelora_jax.runs.prepare import load_base
from stablelora_jax.studies.comparison import seeds_of
from stablelora_jax.studies.preset import Study
from stablelora_jax.studies.significance import mean_std
from stablelora_jax.utils.errors import InputError


def forgetting(
    study: Study,
    rates: Mapping[str, float],
    log_fn: Callable[[str], None],
    kept: dict[str, dict[str, float]],
    save: Callable[[], None],
) -> list[dict[str, Any]]:
    """A row for each task and method: accuracy ``before`` training, and mean, deviation and runs after it.

    Args:
      study: its ``forgetting`` names the tasks.
      rates: the learning rate of each method.
      log_fn: takes lines of text.
      kept: accuracies by run and task that are known already; new ones are added ("" is the base).
      save: called after each that is added.
    """
    preset = study.preset
    points = {m: seeds_of(study, study.task, m, rates[m]) for m in (preset.baseline, preset.method)}
    base = load_base(points[preset.method][0].config)

    def evaluated(name: str) -> dict[str, float]:
        if name not in kept:
            log_fn(f"other tasks: {name or 'the base'}")
            kept[name] = _accuracies(study, _subject(study, base, name))
            save()
        return kept[name]

    before = evaluated("")
    trained = {p.name for own in points.values() for p in own if has_adapter(study.output / "runs" / p.name)}
    after = {m: {p.name: evaluated(p.name) if p.name in trained else {} for p in own} for m, own in points.items()}
    rows = []
    for task in preset.forgetting:
        for method, own in after.items():
            values = {name: found.get(task, math.nan) for name, found in own.items()}
            mean, std = mean_std(list(values.values()))
            rows.append(
                {"task": task, "method": method, "before": before[task], "mean": mean, "std": std, "runs": values}
            )
    return rows


def require_tasks(study: Study) -> None:
    """Check that the tasks have accuracies and rows.

    Raises:
      InputError: there is no such task, it is not multiple choice, or its rows cannot be read.
    """
    for task in study.preset.forgetting:
        if task not in CHOICES:
            raise InputError(f"forgetting: {task} is none of {', '.join(CHOICES)}")
        if task == "merged_qa":
            merged_qa.questions("validation", None if study.data is None else str(study.data))
        else:
            merged_qa.part_questions(task, "validation", None if study.data is None else str(study.data / task))


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
