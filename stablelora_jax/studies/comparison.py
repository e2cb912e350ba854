"""The runs of a study, and what they give: methods at their best learning rates, shrink ratios, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stablelora_jax.config.run import RunConfig
from stablelora_jax.data.tasks import load_questions
from stablelora_jax.data.tasks.question import Question
from stablelora_jax.jobs.file import JobsConfig
from stablelora_jax.jobs.run import train_jobs
from stablelora_jax.runs.files import METRICS
from stablelora_jax.runs.history import read_history
from stablelora_jax.studies.preset import RATIO, STOP, Keys, Point, Study
from stablelora_jax.studies.significance import difference, mean_std
from stablelora_jax.utils.errors import InputError

Row = dict[str, Any]


@dataclass
class Runs:
    """Trains points, each once; all of one directory."""

    study: Study
    log_fn: Callable[[str], None]
    summaries: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def train(self, points: Iterable[Point], what: str) -> None:
        """Train those of ``points`` that are not finished, several side by side."""
        left = {p.name: p.config for p in points if p.name not in self.summaries and p.name not in self.failed}
        if not left:
            return
        self.log_fn(f"{what}: {len(left)} runs")
        jobs = JobsConfig(output=str(self.study.output / "runs"), at_once=self.study.preset.at_once)
        done, failed = train_jobs(jobs, left, lambda text: None)
        for name, why in failed.items():
            self.log_fn(f"{name} failed: {why}; remove its directory in runs/ to try it again")
        self.summaries |= done
        self.failed |= failed

    def value(self, point: Point) -> float:
        """The metric of a run that has been trained; NaN where it failed."""
        found = self.summaries.get(point.name, {}).get("after", {}).get(self.study.preset.metric)
        return math.nan if found is None else float(found)

    def row(self, points: Sequence[Point], **keys: Any) -> Row:
        """Mean and standard deviation over ``points``, which differ in the seed, with the value of each run."""
        values = [self.value(point) for point in points]
        mean, std = mean_std(values)
        return {**keys, "mean": mean, "std": std, "runs": {p.name: v for p, v in zip(points, values, strict=True)}}


def compare(runs: Runs) -> list[Row]:
    """Every method on every task: its learning rates, and all seeds at the best of them.

    A grid whose best rate is at an end grows there by its own ratio, at most ``preset.widen`` times at each end.
    """
    preset = runs.study.preset
    require_choices(runs.study)
    rates = {(task, method): list(preset.learning_rates) for task in preset.tasks for method in preset.methods}
    new = rates
    for turn in range(2 * preset.widen + 1):
        runs.train(_searched(runs.study, new), "learning rates" if turn == 0 else "wider grids of learning rates")
        new = {key: added for key, own in rates.items() if (added := _wider(runs, *key, own))}
        rates = {key: sorted({*own, *new.get(key, ())}) for key, own in rates.items()}
        if not new:
            break
    best = {key: best_rate(runs, *key, own) for key, own in rates.items()}
    reported = [p for key, rate in best.items() for p in seeds_of(runs.study, *key, rate)]
    runs.train(reported, "seeds at the best learning rates")
    return [_method(runs, task, method, own, best[task, method]) for (task, method), own in rates.items()]


def require_choices(study: Study) -> None:
    """Check that the tasks have accuracies where these are compared.

    Raises:
      InputError: a task is not multiple choice, or its rows cannot be read.
    """
    for task in study.preset.tasks if study.preset.metric == "acc" else ():
        config = study.point(task, study.preset.method, study.preset.learning_rates[0], study.preset.seeds[0]).config
        if not all(isinstance(item, Question) for item in load_questions(config.task, "validation")):
            raise InputError(f"tasks.{task} is not multiple choice, so there is no accuracy: set metric: loss")


def _searched(study: Study, rates: Mapping[tuple[str, str], Sequence[float]]) -> list[Point]:
    seeds = study.preset.rate_seeds
    return [study.point(*key, rate, seed) for key, own in rates.items() for rate in own for seed in seeds]


def seeds_of(study: Study, task: str, method: str, rate: float, own: Keys | None = None) -> list[Point]:
    """The runs that are compared: one a seed."""
    return [study.point(task, method, rate, seed, own) for seed in study.preset.seeds]


def _means(runs: Runs, task: str, method: str, rates: Sequence[float]) -> list[float]:
    """The mean at each rate over the seeds that choose; NaN where a run has failed."""
    seeds = runs.study.preset.rate_seeds
    return [float(np.mean([runs.value(runs.study.point(task, method, r, seed)) for seed in seeds])) for r in rates]


def best_rate(runs: Runs, task: str, method: str, rates: Sequence[float]) -> float:
    """The rate with the best mean; of equal ones the middle; where all have failed, the smallest."""
    sign = -1 if runs.study.preset.metric == "loss" else 1
    means = sign * np.array(_means(runs, task, method, rates))
    if not np.isfinite(means).any():
        return rates[0]
    best = np.flatnonzero(means == np.nanmax(means))
    return rates[int(best[len(best) // 2])]


def _wider(runs: Runs, task: str, method: str, rates: Sequence[float]) -> list[float]:
    """The rate to add where the best is at an end that may still grow."""
    given, widen = runs.study.preset.learning_rates, runs.study.preset.widen
    best = best_rate(runs, task, method, rates)
    if best == rates[0] and sum(rate < given[0] for rate in rates) < widen:
        return [float(f"{rates[0] * given[0] / given[1]:.4g}")]
    if best == rates[-1] and sum(rate > given[-1] for rate in rates) < widen:
        return [float(f"{rates[-1] * given[-1] / given[-2]:.4g}")]
    return []


def _method(runs: Runs, task: str, method: str, rates: Sequence[float], best: float) -> Row:
    study = runs.study
    curve = [
        runs.row([study.point(task, method, rate, seed) for seed in study.preset.rate_seeds], rate=rate)
        for rate in rates
    ]
    edge = len(rates) > 1 and best in (rates[0], rates[-1])
    return runs.row(seeds_of(study, task, method, best), task=task, method=method, rate=best, edge=edge, rates=curve)


def differences(runs: Runs, rows: Sequence[Row]) -> list[Row]:
    """Each method minus the baseline, on each task."""
    found, baseline = [], runs.study.preset.baseline
    for row in rows:
        other = next(own for own in rows if own["task"] == row["task"] and own["method"] == baseline)
        if row is other:
            continue
        made = difference(list(row["runs"].values()), list(other["runs"].values()), _both_correct(runs, row, other))
        shared = {"task": row["task"], "method": row["method"], "baseline": baseline}
        found.append(shared | (dict.fromkeys(("mean", "std", "beyond", "low", "high", "p_value"))))
        if made is not None:
            found[-1] |= made._asdict()
    return found


def _both_correct(runs: Runs, *rows: Row) -> tuple[np.ndarray, np.ndarray] | None:
    """(seeds, questions) of both rows; None where the metric is no accuracy of choices."""
    if runs.study.preset.metric != "acc" or any(name in runs.failed for row in rows for name in row["runs"]):
        return None
    first, second = (np.array([_correct(runs, row, name) for name in row["runs"]]) for row in rows)
    return first, second


def _correct(runs: Runs, row: Row, name: str) -> list[bool]:
    """Of each validation question, whether the run answered it rightly at its end."""
    study = runs.study
    config = study.point(row["task"], row["method"], row["rate"], study.preset.seeds[0]).config
    labels = [item.label for item in load_questions(config.task, "validation") if isinstance(item, Question)]
    history = read_history(study.output / "runs" / name / METRICS, 2**63)
    answers = history.evaluations[max(history.evaluations)]["answers"]
    return [answer == label for answer, label in zip(answers, labels, strict=True)]


def shrink_ratios(runs: Runs, rate: float) -> list[Row]:
    """The method with each shrink ratio, with and without the stop rule; a ratio of 0 has none."""
    study = runs.study
    variants: list[Keys] = [{RATIO: ratio} for ratio in study.preset.shrink_ratios]
    variants += [{RATIO: ratio, STOP: False} for ratio in study.preset.shrink_ratios if ratio]
    points = [seeds_of(study, study.task, study.preset.method, rate, own) for own in variants]
    runs.train([p for own in points for p in own], "shrink ratios and no stop rule")
    return [
        runs.row(group, shrink_ratio=own[RATIO], stop_rule=STOP not in own)
        for own, group in zip(variants, points, strict=True)
    ]


def ranks(runs: Runs, rates: Mapping[str, float]) -> list[Row]:
    """Baseline and method at each rank, with the scaling of LoRA (alpha / r) and of rsLoRA (alpha / sqrt(r))."""
    study = runs.study
    variants = [
        (method, scaling, rank)
        for method in (study.preset.baseline, study.preset.method)
        for scaling in ("lora", "rslora")
        for rank in study.preset.ranks
    ]
    points = [
        seeds_of(study, study.task, method, rates[method], {"lora.rank": rank, "lora.scaling": scaling})
        for method, scaling, rank in variants
    ]
    runs.train([p for own in points for p in own], "ranks and scalings")
    return [
        runs.row(group, method=method, scaling=scaling, rank=rank)
        for (method, scaling, rank), group in zip(variants, points, strict=True)
    ]


def looked_at(study: Study, rates: Mapping[str, float]) -> dict[str, RunConfig]:
    """Baseline and method of the first seed, to be trained alone with the terms of their steps measured."""
    found = {}
    for method in (study.preset.baseline, study.preset.method):
        point = study.point(study.task, method, rates[method], study.preset.seeds[0])
        output = f"{point.config.output},terms"
        found[method] = replace(point.config, stability_every=study.preset.stability_every, output=output)
    return found
