"""What pictures show of a run: its ``metrics.jsonl`` as columns, and a name that tells it from other runs."""

from __future__ import annotations

import math
import textwrap
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablelora_jax.runs.files import METRICS
from stablelora_jax.runs.records import each_record
from stablelora_jax.runs.trackers import settings
from stablelora_jax.training.metrics import NORMS
from stablelora_jax.utils.errors import InputError


class Curves(NamedTuple):
    """What a run has logged so far, without what pictures do not show."""

    steps: np.ndarray  # (n,) of the steps with a loss
    series: dict[str, np.ndarray]  # loss, learning_rate, NORMS: (n,) each, NaN where the log has null
    skipped: list[int]  # steps whose update was left out
    stops: list[tuple[int, str]]  # when which pair stopped shrinking
    evaluations: list[tuple[int, float]]  # (step, validation loss), where that is finite
    stability: list[tuple[int, dict[str, Any]]]  # the terms by module
    ratios: list[tuple[int, dict[str, float | None]]]  # the stop rule's ratio by module
    accuracies: list[tuple[int, float]]  # (step, accuracy on held-out questions)
    has_stop_rule: bool  # whether pairs shrink, or have shrunk


def read_curves(directory: str | Path) -> Curves:
    """One pass over the run's ``metrics.jsonl``; a line cut short by a crash is left out.

    Raises:
      InputError: it cannot be read.
    """
    names = ("loss", "learning_rate", *NORMS)
    steps, columns = array("q"), {name: array("d") for name in names}
    curves = Curves(np.zeros(0), {}, [], [], [], [], [], [], False)
    path, shrinks = Path(directory) / METRICS, False
    try:
        for record in each_record(path):
            _take(record, curves)
            shrinks = shrinks or bool(record.get("shrinking") or record.get("stopped"))
            if "loss" in record:
                steps.append(record["step"])
                for name, column in columns.items():
                    column.append(_number(record.get(name)))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    series = {name: np.array(column) for name, column in columns.items()}
    return curves._replace(steps=np.array(steps), series=series, has_stop_rule=shrinks)


def labels(directories: Sequence[Path]) -> list[str]:
    """A name for each run: the keys that differ between them, as ``lora.rank=4``; where that says nothing, its path."""
    found = [settings(directory) for directory in directories]
    keys = [key for key in dict.fromkeys(key for one in found for key in one) if key != "output"]
    differ = [key for key in keys if any(one.get(key) != found[0].get(key) for one in found)]
    names = [", ".join(f"{key}={_show(one[key])}" for key in differ if key in one) for one in found]
    places = [d.resolve().name for d in directories]
    places = [str(d) if places.count(place) > 1 else place for d, place in zip(directories, places, strict=True)]
    said = Counter(names)
    names = [n if n and said[n] == 1 else f"{p} ({n})" if n else p for n, p in zip(names, places, strict=True)]
    return [textwrap.shorten(name, 120) for name in names]


class Ratios(NamedTuple):
    """``(||A||_F / in) / (||B||_F / out)`` of every pair, where it was recorded."""

    steps: np.ndarray  # (n,)
    names: list[str]  # (pairs,) dotted module names
    values: np.ndarray  # (n, pairs), NaN where B was zero or nothing was recorded


def ratios_of(curves: Curves) -> Ratios:
    """The ratios as a table; of an older run's log, from the terms of the stability analysis where it has them."""
    rows = curves.ratios or [
        (step, {name: t["a"] / t["b"] if t.get("a") and t.get("b") else None for name, t in terms.items()})
        for step, terms in curves.stability
    ]
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    values = np.array([[_number(row.get(name)) for name in names] for _, row in rows]).reshape(len(rows), len(names))
    values[~(values > 0)] = math.nan  # a log axis shows no zero
    return Ratios(np.array([step for step, _ in rows], int), names, values)


def _take(record: dict[str, Any], curves: Curves) -> None:
    """Add what happened at a step to the lists."""
    step = record["step"]
    if record.get("skipped"):
        curves.skipped.append(step)
    curves.stops.extend((step, name) for name in record.get("stopped", ()))
    if math.isfinite(loss := _number(record.get("validation", {}).get("loss"))):
        curves.evaluations.append((step, loss))
    if math.isfinite(accuracy := _number(record.get("validation", {}).get("acc"))):
        curves.accuracies.append((step, accuracy))
    if "stability" in record:
        curves.stability.append((step, record["stability"]))
    if "stop_ratios" in record:
        curves.ratios.append((step, record["stop_ratios"]))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
