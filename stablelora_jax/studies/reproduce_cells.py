"""What the sections of a study's page are made of, and how values and differences are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stablelora_jax.runs.report_charts import Chart
from stablelora_jax.studies import reproduce_charts as charts
from stablelora_jax.studies.width_panels import signed

Row = Mapping[str, Any]
UNKNOWN = "\N{EN DASH}"
UNMEASURED = "Not measured by this preset."


class Cell(NamedTuple):
    """A value of a table, and the runs that it is of."""

    text: str
    runs: tuple[str, ...] = ()


class Table(NamedTuple):
    """A table: a heading for each column, and rows whose first cell is their name."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Part(NamedTuple):
    """A section of the page."""

    id: str
    title: str
    said: Sequence[str]  # paragraphs
    charts: Sequence[Chart]
    tables: Sequence[Table]


def shown(results: Row, row: Row) -> Cell:
    """Mean and deviation of a row, with its runs."""
    times, _ = charts.factor(results)
    digits = 1 if times == 100 else 4
    if row["mean"] is None:
        return Cell("failed", tuple(row.get("runs", ())))
    spread = "" if row["std"] is None else f" ± {times * row['std']:.{digits}f}"
    return Cell(f"{times * row['mean']:.{digits}f}{spread}", tuple(row.get("runs", ())))


def unit(results: Row) -> str:
    """The unit of what is compared."""
    return "accuracy in %" if results["settings"]["preset"]["metric"] == "acc" else "loss in nats per token"


def about(results: Row) -> str:
    """The caption of a table of :func:`shown`."""
    return f"{unit(results)[0].upper()}{unit(results)[1:]} on the validation set: mean ± standard deviation over seeds"


def sentence(results: Row, found: Row) -> str:
    """A difference in words."""
    who = f"{found['task']}: {found['method']} minus {found['baseline']}"
    if found["mean"] is None:
        return f"{who}: a run has no finite result."
    times, _ = charts.factor(results)
    digits, kind = (1, " points") if times == 100 else (4, "")
    text = f"{who}: {signed(times * found['mean'], digits)}{kind}"
    if found["std"] is not None:
        verdict = "more than" if found["beyond"] else "within"
        text += f", {verdict} two standard deviations over seeds ({times * found['std']:.{digits}f} each)"
    return text + (f"; p = {found['p_value']:.2g} over the questions." if found["p_value"] is not None else ".")


def shown_percent(row: Row) -> Cell:
    """As :func:`shown`, of an accuracy whatever the metric is."""
    if row["mean"] is None:
        return Cell(UNKNOWN)
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    return Cell(f"{100 * row['mean']:.1f}{spread}", tuple(row["runs"]))


def first_task(results: Row) -> str:
    """The task of all sections but that of methods."""
    return str(next(iter(results["settings"]["preset"]["tasks"])))
