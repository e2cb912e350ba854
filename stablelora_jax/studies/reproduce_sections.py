"""The sections of a study's page: what was found, in words and tables, from ``results.json``."""

from __future__ import annotations

from pathlib import Path

import yaml

from stablelora_jax.studies import reproduce_charts as charts
from stablelora_jax.studies import reproduce_compared as compared
from stablelora_jax.studies.preset import FOLDER
from stablelora_jax.studies.reproduce_cells import (
    UNKNOWN,
    UNMEASURED,
    Cell,
    Part,
    Row,
    Table,
    first_task,
    shown,
    shown_percent,
)
from stablelora_jax.studies.width_panels import signed


def parts(results: Row, widths: Row, output: Path) -> list[Part]:
    """All sections, in the order of the page.

    Args:
      results: the content of ``results.json``.
      widths: that of ``width-scaling/results.json``.
      output: the directory of the study.
    """
    made = [_widths(results, widths), compared.methods(results), compared.shrink(results), _terms(results, output)]
    return [*made, compared.ranks(results), _overhead(results), _forgetting(results), _reported(results)]


def _widths(results: Row, found: Row) -> Part:
    said = [
        "One LoRA layer is trained at several widths n. A step changes the layer's output by delta1 = s x A dB, "
        "delta2 = s x dA B and delta3 = s x dA dB. Learning carries over from narrow to wide layers where none of them "
        "grows or vanishes with n.",
        "Theory: with Adam, delta1 grows with n where the initial A is too large for the learning rate, and goes "
        "on dominating; Stable-LoRA shrinks A until the terms are balanced, longer in wider layers. Where the "
        "table differs: at small n, what A has learnt outweighs what it began with, so that late exponents are "
        "between theory's and those of a small A; and where the learning rate is small A shrinks too far, which "
        "takes the late exponents of Stable-LoRA below theory's.",
    ]
    names = [name for name in found["slopes"] if name.startswith("R3 ")]
    columns = (("early", "delta1"), ("late", "delta1"), ("late", "ratio"), ("late", "az"))
    rows = [[Cell(name), *(_slope(found["slopes"][name][span][key]) for span, key in columns)] for name in names]
    head = ("config", "early delta1", "late delta1", "late delta1 / delta2", "late RMS(x A)")
    size = results["settings"]["preset"]["width_scaling"]
    note = "" if size == "full" else " (the short form of the study, whose exponents are rough)"
    table = Table(f"Exponents of n, in brackets theory's for large n{note}", head, rows)
    return Part("widths", "Feature learning across widths", said, charts.widths(found), [table])


def _slope(found: Row) -> Cell:
    half = "" if found["high"] is None else f" ± {found['high'] - found['slope']:.2f}"
    return Cell(f"{signed(found['slope'])}{half} ({signed(found['theory'], 1)})")


def _terms(results: Row, output: Path) -> Part:
    runs = [[Cell(name), Cell(run, (run,))] for name, run in results["terms"].items()]
    baseline = results["settings"]["preset"]["baseline"]
    said = [
        f"Two runs on {first_task(results)}, each at its method's best learning rate. Stable-LoRA shrinks the A of a "
        f"pair until (||A|| / in) / (||B|| / out) falls below 1; with {baseline} it falls only as B grows."
    ]
    return Part(
        "terms", "Norms and terms over steps and layers", said, charts.terms(results, output),
        [Table("The two runs", ["method", "run"], runs)],
    )  # fmt: skip


def _overhead(results: Row) -> Part:
    rows = [
        [
            Cell(row["method"]),
            Cell(f"{row['milliseconds']:.1f}"),
            Cell(f"{signed(100 * (row['relative'] - 1), 1)} %"),
            Cell(f"{signed(100 * (row['low'] - 1), 1)} to {signed(100 * (row['high'] - 1), 1)} %"),
            Cell(f"{row['state_bytes'] / 1e6:.2f}"),
            Cell(f"{row['step_bytes'] / 1e6:.1f}"),
        ]
        for row in results["overhead"]
    ]
    head = ["method", "ms a step", "more time", "middle half of rounds", "optimizer state, MB", "step, MB"]
    where = results["environment"]["devices"]
    said = [
        f"A training step of {first_task(results)} on {where}, methods in turns. More time: the median over the rounds "
        "of the time beside the baseline's in the same round. Step: arguments and temporaries of the compiled step."
    ]
    tables = [Table("Time and memory of a step", head, rows)]
    return Part("overhead", "Overhead", said if rows else [UNMEASURED], [], tables if rows else [])


def _forgetting(results: Row) -> Part:
    rows = [
        [Cell(row["task"]), Cell(row["method"]), Cell(f"{100 * row['before']:.1f}"), shown_percent(row)]
        for row in results["forgetting"]
    ]
    if not rows:
        return Part("forgetting", "Forgetting", [UNMEASURED], [], [])
    said = [f"Accuracy on tasks that were not trained on, before and after training on {first_task(results)}."]
    table = Table("Accuracy in %: mean ± standard deviation over seeds", ["task", "method", "base", "after"], rows)
    return Part("forgetting", "Forgetting", said, [], [table])


def _mean(results: Row, method: str) -> str:
    """The mean of a method over the tasks."""
    values = [row["mean"] for row in results["methods"] if row["method"] == method]
    return UNKNOWN if not values or None in values else f"{100 * sum(values) / len(values):.1f}"


def _reported(results: Row) -> Part:
    paper = yaml.safe_load((FOLDER / "reported.yaml").read_text(encoding="utf-8"))
    preset = results["settings"]["preset"]
    named = {"Riemannian": "Riemannian (scaled AdamW)"}
    names = list(next(iter(paper["methods"].values())))
    rows = [[Cell(f"{m}, paper"), *(Cell(f"{own[n]:.2f}") for n in names)] for m, own in paper["methods"].items()]
    by_key = {(row["task"], row["method"]): row for row in results["methods"]}
    if preset["metric"] == "acc":
        for task in preset["tasks"]:
            ours = [shown(results, by_key[task, n]) if (task, n) in by_key else Cell(UNKNOWN) for n in names]
            rows.append([Cell(f"{task}, this study"), *ours])
        if len(preset["tasks"]) > 1:
            rows.append([Cell("mean of these tasks, this study"), *(Cell(_mean(results, name)) for name in names)])
    measured = results["overhead"] if preset["baseline"] == "AdamW" else []
    times = {row["method"]: f"{signed(100 * (row['relative'] - 1), 1)}" for row in measured}
    cost = [
        [Cell("Qwen2 0.5B, paper"), *(Cell(f"{signed(paper['overhead'][n], 1)}") for n in names)],
        [Cell("this study"), *(Cell(times.get(n, UNKNOWN)) for n in names)],
    ]
    stops = [[Cell(m), *(Cell(f"{own[k]:.2f}") for k in ("with", "without"))] for m, own in paper["stop_rule"].items()]
    head = [named.get(n, n) for n in names]
    said = [
        "The paper's numbers are means over five question sets of other models, each the best of three seeds; ours are "
        "means over seeds. The paper also searched the shrink ratio for them; (b) does not. Its numbers come "
        "from notes on the paper and were not compared with its tables. Only the order of methods, and the size of "
        "differences, can be compared."
    ]
    tables = [
        Table("Accuracy in %", ["model or task", *head], rows),
        Table("More time than AdamW, in %", ["", *head], cost),
        Table("The paper's ablation of the stop rule, accuracy in %", ["model", "with", "without"], stops),
    ]
    return Part("paper", "Beside the paper's own numbers", said, [], tables)
