"""The results of a sweep: mean and standard deviation over seeds, and each method's best learning rate.

Nothing is chosen among seeds. A learning rate that is best at the edge of its grid is marked: a better one may lie
beyond.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stablelora_jax.jobs.sweep import Point, label
from stablelora_jax.runs.records import plain
from stablelora_jax.runs.summary import environment
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import read_json_object, write_whole, writing

RESULTS, TABLE = "results.json", "results.md"
MARK = "stablelora_jax sweep"
SEED, RATE = "seed", "optimizer.learning_rate"


def metric_of(points: Mapping[str, Point], summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """What is compared: the ``metric`` of the configurations on the validation set, else the last training losses."""
    asked = {point.config.metric for point in points.values()}
    evaluated = all("after" in summary for summary in summaries.values())
    return asked.pop() if len(asked) == 1 and evaluated else "loss_last_10"


def is_lower_better(metric: str) -> bool:
    """Whether low values of the metric are good ones."""
    return metric.startswith("loss")


def value_of(summary: Mapping[str, Any], metric: str) -> float:
    """The number of a run; NaN where it is not finite."""
    own = summary.get("kept") or summary.get("after") or {}
    found = summary[metric] if metric == "loss_last_10" else own[metric]
    return math.nan if found is None else float(found)


def rows(
    points: Mapping[str, Point], summaries: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One for each point of the grid without its seed: the values, the runs, mean and standard deviation.

    The deviation is that of the sample, None with one seed. A failed or not finite run makes the mean NaN.
    """
    metric = metric_of(points, summaries)
    found: dict[str, dict[str, Any]] = {}
    for name, point in points.items():
        rest = {key: value for key, value in point.values.items() if key != SEED}
        row = found.setdefault(repr(rest), {"values": rest, "runs": {}, "failed": 0})
        row["runs"][name] = value_of(summaries[name], metric) if name in summaries else math.nan
        row["failed"] += name in failed
    for row in found.values():
        values = list(row["runs"].values())
        several = len(values) > 1 and all(map(math.isfinite, values))
        row |= {"mean": statistics.fmean(values), "std": statistics.stdev(values) if several else None}
    return list(found.values())


def best_rates(table: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Of each method (all values but the learning rate), the row of the best rate; ``edge``: it ends its grid."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        rest = {key: value for key, value in row["values"].items() if key != RATE}
        methods.setdefault(repr(rest), []).append(row)
    found = []
    for own in methods.values():
        finite = [row for row in own if math.isfinite(row["mean"])]
        if not finite:
            continue
        best = (min if is_lower_better(metric) else max)(finite, key=lambda row: row["mean"])
        rates = sorted(row["values"][RATE] for row in own) if RATE in best["values"] else []
        found.append({**best, "edge": len(rates) > 1 and best["values"][RATE] in (rates[0], rates[-1])})
    return found


def ranked(table: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The rows, the best first, those that are not finite last."""
    sign = 1 if is_lower_better(metric) else -1
    return sorted(table, key=lambda row: sign * row["mean"] if math.isfinite(row["mean"]) else math.inf)


def markdown(table: list[dict[str, Any]], metric: str, rates: bool = True) -> str:
    """The table of all points, and with ``rates`` that of the best learning rates where there are several."""
    lines = [f"Mean and standard deviation of `{metric}` over seeds.", "", "| point | seeds | mean | std |"]
    lines += ["| --- | --- | --- | --- |", *map(_line, table)]
    if rates and any(RATE in row["values"] for row in table):
        lines += [
            "",
            "At each method's best learning rate:",
            "",
            "| point | seeds | mean | std |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            _line(row) + (" at the edge of the grid |" if row["edge"] else "") for row in best_rates(table, metric)
        ]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    name = ", ".join(label(key, value) for key, value in row["values"].items())
    failed = f" ({row['failed']} failed)" if row["failed"] else ""
    std = "-" if row["std"] is None else f"{row['std']:.4g}"
    return f"| {name} | {len(row['runs'])}{failed} | {row['mean']:.5g} | {std} |"


def write_results(
    output: Path,
    points: Mapping[str, Point],
    summaries: Mapping[str, Any],
    failed: Mapping[str, str],
    command: str,
    search: bool = False,
) -> str:
    """Write ``results.json`` and ``results.md``, and return the table; of a search, with the best trial on top.

    Raises:
      InputError: files of these names are somebody else's.
      RunError: they cannot be written.
    """
    metric, table = metric_of(points, summaries), rows(points, summaries, failed)
    table = ranked(table, metric) if search else table
    best = table[:1] if search else best_rates(table, metric)
    text = markdown(table, metric, rates=not search)
    own = {"made_by": MARK, "command": command, "metric": metric, "points": table, "failed": failed}
    own |= {"best": best, "environment": environment()}
    require_own(output)
    with writing(output / RESULTS):
        write_whole(output / RESULTS, json.dumps(plain(own), indent=2) + "\n")
        write_whole(output / TABLE, f"<!-- {MARK} -->\n{text}")
    return text


def require_own(output: Path) -> None:
    """Check that results of an earlier sweep, or nothing, lie in ``output``.

    Raises:
      InputError: something else does.
    """
    json_file, table = output / RESULTS, output / TABLE
    if json_file.exists() and read_json_object(json_file).get("made_by") != MARK:
        raise InputError(f"{json_file} was not made by a sweep: move it, or choose another output")
    if table.exists() and not table.read_text(errors="replace").startswith(f"<!-- {MARK} -->"):
        raise InputError(f"{table} was not made by a sweep: move it, or choose another output")
