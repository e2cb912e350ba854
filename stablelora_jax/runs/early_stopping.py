"""The best evaluation of a run, and early stopping: functions of the logged evaluations.

They read nothing else, so a resumed run decides like one that was never interrupted. The evaluation before training
and values that are not finite do not count; of equal values the first is the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

Metric = Literal["loss", "acc", "acc_norm"]
Evaluations = Mapping[int, Mapping[str, Any]]  # by step


def best_step(evaluations: Evaluations, metric: Metric) -> int | None:
    """The step of the best evaluation, by lowest loss or highest accuracy; None where none counts.

    Example::

      >>> best_step({0: {"loss": 0.1}, 5: {"loss": 2.0}, 10: {"loss": 1.5}}, "loss")
      10
    """
    sign = 1 if metric == "loss" else -1
    values = {step: e.get(metric, math.nan) for step, e in evaluations.items() if step > 0}
    ranked = [(sign * value, step) for step, value in values.items() if math.isfinite(value)]
    return min(ranked)[1] if ranked else None


def patience_exceeded(evaluations: Evaluations, metric: Metric, patience: int | None) -> bool:
    """Whether ``patience`` evaluations have passed since the best one; never where it is None.

    Example::

      >>> evaluations = {5: {"loss": 1.0}, 10: {"loss": 1.5}, 15: {"loss": 1.25}}
      >>> patience_exceeded(evaluations, "loss", 2), patience_exceeded(evaluations, "loss", 3)
      (True, False)
    """
    best = best_step(evaluations, metric) or 0
    return patience is not None and sum(step > best for step in evaluations) >= patience
