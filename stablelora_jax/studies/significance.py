"""Are two methods different? Over seeds by their standard deviations, over questions by a paired test.

The rule of the field's audits (arXiv 2602.04998): a difference counts where it exceeds two standard deviations over
seeds. The paired test takes questions as the sample: it says whether more of *such questions* would be answered,
given these seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Difference(NamedTuple):
    """Of the first method minus the second."""

    mean: float
    std: float | None  # over seeds: the root of the mean variance of both; None with one seed
    beyond: bool | None  # whether the difference exceeds two such deviations
    low: float | None  # 95 % confidence interval over questions, Student's; None without questions
    high: float | None
    p_value: float | None  # two-sided, paired over questions


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the sample; None where a value is not finite, the latter also with one value."""
    if not values or not all(map(math.isfinite, values)):
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def difference(
    first: Sequence[float], second: Sequence[float], correct: tuple[np.ndarray, np.ndarray] | None = None
) -> Difference | None:
    """Compare two methods; None where a run of either has no finite result.

    Args:
      first: a value for each seed.
      second: the same of the other method.
      correct: (seeds, questions) of each, whether the question was answered rightly; its mean over seeds is compared.

    Example::

      >>> found = difference([0.62, 0.64], [0.60, 0.60])
      >>> round(found.mean, 3), round(found.std, 3), found.beyond
      (0.03, 0.01, True)
    """
    (a, std_a), (b, std_b) = mean_std(first), mean_std(second)
    if a is None or b is None:
        return None
    std = math.sqrt((std_a**2 + std_b**2) / 2) if std_a is not None and std_b is not None else None
    beyond = None if std is None else abs(a - b) > 2 * std
    low, high, p_value = (None, None, None) if correct is None else _paired(correct[0].mean(0) - correct[1].mean(0))
    return Difference(a - b, std, beyond, low, high, p_value)


def _paired(differences: np.ndarray) -> tuple[Any, Any, Any]:
    """(low, high, p) of the mean of ``differences`` (questions,); p is None where all are equal."""
    from scipy.special import stdtr, stdtrit

    n = len(differences)
    if n < 2:
        return None, None, None
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    mean = float(differences.mean())
    if error == 0:
        return mean, mean, None
    half = float(stdtrit(n - 1, 0.975)) * error
    return mean - half, mean + half, float(2 * stdtr(n - 1, -abs(mean) / error))
