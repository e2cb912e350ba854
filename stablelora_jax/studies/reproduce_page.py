"""The pages of a study: one HTML file that needs no script and no network, and the same in Markdown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stablelora_jax.runs.report import render
from stablelora_jax.studies import reproduce_charts as charts
from stablelora_jax.studies.reproduce_cells import Cell, Part, Table, sentence, unit
from stablelora_jax.studies.reproduce_sections import parts
from stablelora_jax.utils.files import read_json_object

MARK = "<!doctype html>\n<!-- stablelora_jax: page of a study -->\n"  # how the page begins
TEXT_MARK = "<!-- stablelora_jax: page of a study -->\n"


def page(results: Mapping[str, Any], made: Sequence[Part]) -> str:
    """The HTML page.

    Args:
      results: the content of ``results.json``.
      made: its sections, of :func:`sections`.
    """
    return render(
        "reproduce.html.jinja",
        title=_title(results),
        found=found(results),
        facts=facts(results),
        parts=made,
        groups=_groups(made),
        runs=list(_runs(results)),
        unit=unit(results),
        failed=results["failed"],
        environment=environment(results),
        anchor=_anchor,
        quote=quote,
    )


def text(results: Mapping[str, Any], made: Sequence[Part]) -> str:
    """The same in Markdown, without charts."""
    lines = [TEXT_MARK + f"# {_title(results)}", ""]
    lines += [f"- {term}: {value}" for term, value in facts(results)]
    for letter, part in zip("abcdefgh", made, strict=True):
        lines += ["", f"## ({letter}) {part.title}"]
        for paragraph in part.said:
            lines += ["", paragraph]
        for table in part.tables:
            lines += ["", f"{table.caption}:", "", *_lines(table)]
    lines += ["", "## Runs", "", "`results.json` has the name and the value of every run.", ""]
    lines += [f"- failed: {name}: {why}" for name, why in results["failed"].items()]
    lines += ["", "## Environment", "", *(f"- {key}: {value}" for key, value in environment(results))]
    return "\n".join(lines) + "\n"


def sections(results: Mapping[str, Any], output: Path) -> list[Part]:
    """The sections of both pages, with their charts drawn.

    Args:
      results: the content of ``results.json``.
      output: the directory of the study.
    """
    return parts(results, read_json_object(output / "width-scaling" / "results.json"), output)


def _lines(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(map(_escaped, table.head))} |"
    yield f"|{' --- |' * len(table.head)}"
    for row in table.rows:
        yield f"| {' | '.join(_escaped(cell.text) for cell in row)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _title(results: Mapping[str, Any]) -> str:
    return f"Stable-LoRA's claims, measured again: {results['name']}"


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The size of the study."""
    preset = results["settings"]["preset"]
    return [
        ("tasks", ", ".join(preset["tasks"])),
        ("methods", str(len(preset["methods"]))),
        ("runs", str(len(list(_runs(results))))),
        ("seeds", str(len(preset["seeds"]))),
        ("time of calls that ended", f"{results['seconds'] / 60:.1f} minutes"),
    ]


def found(results: Mapping[str, Any]) -> list[str]:
    """What the method gains over the baseline, in a sentence a task."""
    method = results["settings"]["preset"]["method"]
    return [sentence(results, one) for one in results["differences"] if one["method"] == method]


def environment(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Command, date and versions."""
    return [("command", results["command"]), ("date", results["date"]), *results["environment"].items()]


def _runs(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of every run, each once."""
    rows = [one for row in results["methods"] for one in (*row["rates"], row)]
    rows += [*results["shrink_ratios"], *results["ranks"]]
    times, _ = charts.factor(results)
    found = {name: value for row in rows for name, value in row["runs"].items()}
    for name, value in found.items():
        yield name, "failed" if value is None else f"{times * value:.4g}"
    for name in results["terms"].values():
        yield name, "see its charts"


def _anchor(runs: Sequence[str]) -> str:
    """Of the rows of :func:`_groups`; the same runs have one."""
    return "runs-" + hashlib.sha256("\n".join(runs).encode()).hexdigest()[:12]


def _groups(made: Sequence[Part]) -> list[Cell]:
    """Every value of several runs, or of one, once."""
    cells = [cell for part in made for table in part.tables for row in table.rows for cell in row if cell.runs]
    return list({cell.runs: cell for cell in reversed(cells)}.values())[::-1]
