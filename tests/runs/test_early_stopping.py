"""Which evaluation is the best, and when a run has waited long enough for a better one."""

import math

import pytest

from stablelora_jax.runs.early_stopping import best_step, patience_exceeded


@pytest.mark.parametrize(
    "values,metric,best",
    [
        ([9, 3, 1, 2], "loss", 2),
        ([0, 0.3, 0.5, 0.5], "acc", 2),
        ([9, 1, 1, 1], "acc_norm", 1),
        ([0, 3, 4, 5], "loss", 1),  # before training does not count
        ([9, math.nan, 5, math.inf], "loss", 2),
        ([9, math.nan, math.nan], "loss", None),
        ([9], "loss", None),
        ([], "loss", None),
    ],
)
def test_the_best(values, metric, best):
    evaluations = {step: {metric: value} for step, value in enumerate(values)}
    assert best_step(evaluations, metric) == best
    assert best_step(dict(reversed(evaluations.items())), metric) == best


@pytest.mark.parametrize(
    "values,patience,stops",
    [
        ([9, 3, 2, 1], 1, [False] * 4),
        ([9, 3, 4, 1], 1, [False, False, True, False]),
        ([9, 3, 4, 5], 2, [False, False, False, True]),
        ([9, 3, 3, 3], None, [False] * 4),
        ([9, math.nan, math.nan], 2, [False, False, True]),
    ],
)
def test_patience(values, patience, stops):
    evaluations = {step: {"loss": value} for step, value in enumerate(values)}
    seen = [{s: e for s, e in evaluations.items() if s <= step} for step in evaluations]
    assert [patience_exceeded(some, "loss", patience) for some in seen] == stops
