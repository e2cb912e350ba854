"""Which evaluation of a run is the best, and when to stop waiting for a better one: functions of what is logged.

Since they read nothing else, a run that is resumed decides as one that was never interrupted. The evaluation before
training does not count, nor does a value that is not finite; of equal ones the first is the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

Metric = Literal["loss", "acc", "acc_norm"]
Evaluations = Mapping[int, Mapping[str, Any]]  # by step


def best_step(evaluations: Evaluations, metric: Metric) -> int | None:
    """The step of the best evaluation, or None where none counts: the least loss, or the greatest accuracy."""
    sign = 1 if metric == "loss" else -1
    values = {step: e.get(metric, math.nan) for step, e in evaluations.items() if step > 0}
    ranked = [(sign * value, step) for step, value in values.items() if math.isfinite(value)]
    return min(ranked)[1] if ranked else None


def patience_exceeded(evaluations: Evaluations, metric: Metric, patience: int | None) -> bool:
    """Whether ``patience`` evaluations have gone by since the best one; never where it is None."""
    best = best_step(evaluations, metric) or 0
    return patience is not None and sum(step > best for step in evaluations) >= patience
