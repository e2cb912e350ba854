"""The sections of a study's page: what was found, in words and tables, from ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stablelora_jax.runs.report_charts import Chart
from stablelora_jax.studies import reproduce_charts as charts
from stablelora_jax.studies.preset import FOLDER
from stablelora_jax.studies.width_panels import signed

Row = Mapping[str, Any]
SCALINGS = {"lora": "LoRA", "rslora": "rsLoRA"}
UNKNOWN = "\N{EN DASH}"


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


def parts(results: Row, widths: Row, output: Path) -> list[Part]:
    """All sections, in the order of the page.

    Args:
      results: the content of ``results.json``.
      widths: that of ``width-scaling/results.json``.
      output: the directory of the study.
    """
    made = [_widths(results, widths), _methods(results), _shrink(results), _terms(results, output), _ranks(results)]
    return [*made, _overhead(results), _forgetting(results), _reported(results)]


def shown(results: Row, row: Row) -> Cell:
    """Mean and deviation of a row, with its runs."""
    times, _ = charts.factor(results)
    digits = 1 if times == 100 else 4
    if row["mean"] is None:
        return Cell("not finite", tuple(row.get("runs", ())))
    spread = "" if row["std"] is None else f" ± {times * row['std']:.{digits}f}"
    return Cell(f"{times * row['mean']:.{digits}f}{spread}", tuple(row.get("runs", ())))


def unit(results: Row) -> str:
    """The unit of what is compared."""
    return "accuracy in %" if results["settings"]["preset"]["metric"] == "acc" else "loss in nats per token"


def _about(results: Row) -> str:
    return f"{unit(results)[0].upper()}{unit(results)[1:]} on the validation set: mean ± standard deviation over seeds"


def _widths(results: Row, found: Row) -> Part:
    said = [
        "One LoRA layer is trained at several widths n. A step changes the layer's output by delta1 = s x A dB, "
        "delta2 = s x dA B and delta3 = s x dA dB. Learning carries over from narrow to wide layers where none of them "
        "grows or vanishes with n.",
        "With Adam, delta1 grows with n where the initial A is too large for the learning rate. Stable-LoRA shrinks A "
        "until the terms are balanced, longer in wider layers.",
    ]
    names = [name for name in found["slopes"] if name.startswith("R3 ")]
    columns = (("early", "delta1"), ("late", "delta1"), ("late", "ratio"), ("late", "az"))
    rows = [[Cell(name), *(_slope(found["slopes"][name][span][key]) for span, key in columns)] for name in names]
    head = ("config", "early delta1", "late delta1", "late delta1 / delta2", "late RMS(x A)")
    size = results["settings"]["preset"]["width_scaling"]
    note = "" if size == "full" else " (the short form of the study, whose exponents are rough)"
    table = Table(
        f"Exponents of n, in brackets theory's for large n{note}; more in width-scaling/index.html", head, rows
    )
    return Part("widths", "Feature learning across widths", said, charts.widths(found), [table])


def _slope(found: Row) -> Cell:
    half = "" if found["high"] is None else f" ± {found['high'] - found['slope']:.2f}"
    return Cell(f"{signed(found['slope'])}{half} ({signed(found['theory'], 1)})")


def _methods(results: Row) -> Part:
    preset, rows = results["settings"]["preset"], results["methods"]
    chooses = ", ".join(map(str, preset["rate_seeds"]))
    said = [sentence(results, found) for found in results["differences"]]
    said += [
        f"Each method takes the learning rate with the best mean over the seeds that choose ({chooses}); a grid whose "
        "best rate is at an end is widened. No seed is chosen. The validation set also chooses the rates, so all means "
        "are a little high."
    ]
    edges = [f"{row['method']} on {row['task']}" for row in rows if row["edge"]]
    said += [f"Still best at the end of its grid: {', '.join(edges)}."] if edges else []
    tasks = list(preset["tasks"])
    by_key = {(row["task"], row["method"]): row for row in rows}
    values = [
        [Cell(m), *(c for t in tasks for c in (shown(results, by_key[t, m]), Cell(f"{by_key[t, m]['rate']:g}")))]
        for m in preset["methods"]
    ]
    head = ["method", *(name for task in tasks for name in (task, "learning rate"))]
    tables = [
        Table(f"{_about(results)}, and the best learning rate", head, values),
        _differences(results),
        *(_curve(results, task) for task in tasks),
    ]
    return Part("methods", "Methods", said, [*charts.learning_rates(results), *charts.seeds(results)], tables)


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


def _differences(results: Row) -> Table:
    times, _ = charts.factor(results)
    digits = 1 if times == 100 else 4
    rows = []
    for found in results["differences"]:
        numbers = [found[key] for key in ("mean", "std", "low", "high")]
        mean, std, low, high = (UNKNOWN if x is None else signed(times * x, digits) for x in numbers)
        beyond = {None: UNKNOWN, True: "yes", False: "no"}[found["beyond"]]
        p_value = UNKNOWN if found["p_value"] is None else f"{found['p_value']:.2g}"
        name = f"{found['method']}, {found['task']}"
        rows.append([Cell(text) for text in (name, mean, std.lstrip("+"), beyond, f"{low} to {high}", p_value)])
    head = ["method, task", "difference", "std over seeds", "beyond 2 std", "95 % over questions", "p"]
    baseline = results["settings"]["preset"]["baseline"]
    return Table(f"Minus {baseline}; interval and p: paired over questions, for these seeds", head, rows)


def _curve(results: Row, task: str) -> Table:
    own = [row for row in results["methods"] if row["task"] == task]
    rates = sorted({one["rate"] for row in own for one in row["rates"]})
    rows = []
    for row in own:
        known = {one["rate"]: shown(results, one) for one in row["rates"]}
        rows.append([Cell(row["method"]), *(known.get(rate, Cell(UNKNOWN)) for rate in rates)])
    return Table(
        f"{task} by learning rate, over the seeds that choose it", ["method", *(f"{r:g}" for r in rates)], rows
    )


def _shrink(results: Row) -> Part:
    rows = results["shrink_ratios"]
    ratios = dict.fromkeys(row["shrink_ratio"] for row in rows)
    by_key = {(row["shrink_ratio"], row["stop_rule"]): shown(results, row) for row in rows}
    cells = [[Cell(f"{r:g}"), *(by_key.get((r, stop), Cell(UNKNOWN)) for stop in (True, False))] for r in ratios]
    table = Table(_about(results), ["shrink ratio", "with stop rule", "without"], cells)
    preset = results["settings"]["preset"]
    said = [f"{preset['method']} on {_task(results)}, at its best learning rate; a ratio of 0 is AdamW at that rate."]
    return Part("shrink", "Shrink ratio and stop rule", said, charts.shrink_ratios(results) if rows else [], [table])


def _terms(results: Row, output: Path) -> Part:
    runs = [[Cell(name), Cell(run, (run,))] for name, run in results["terms"].items()]
    said = [
        f"Two runs on {_task(results)}, each at its method's best learning rate. Stable-LoRA shrinks the A of a pair "
        "until (||A|| / in) / (||B|| / out) falls below 1; with AdamW it falls only as B grows."
    ]
    return Part(
        "terms", "Norms and terms over steps and layers", said, charts.terms(results, output),
        [Table("The two runs", ["method", "run"], runs)],
    )  # fmt: skip


def _ranks(results: Row) -> Part:
    rows = results["ranks"]
    names = list(dict.fromkeys(row["rank"] for row in rows))
    kinds = list(dict.fromkeys((row["method"], row["scaling"]) for row in rows))
    by_key = {(row["method"], row["scaling"], row["rank"]): shown(results, row) for row in rows}
    cells = [[Cell(f"{m}, {SCALINGS[s]}"), *(by_key[m, s, rank] for rank in names)] for m, s in kinds]
    said = [
        f"{_task(results)}, at each method's best learning rate for the rank of the comparison above; the rate is not "
        "searched again for each rank, which favours that rank."
    ]
    table = Table(_about(results), ["method, scaling", *(f"r = {rank}" for rank in names)], cells)
    return Part("ranks", "Ranks", said, charts.ranks(results) if rows else [], [table])


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
        f"A training step of {_task(results)} on {where}, methods in turns. More time: the median over the rounds of "
        "the time beside the baseline's in the same round. Step: arguments and temporaries of the compiled step."
    ]
    tables = [Table("Time and memory of a step", head, rows)]
    return Part("overhead", "Overhead", said if rows else ["Not measured by this preset."], [], tables if rows else [])


def _forgetting(results: Row) -> Part:
    rows = [
        [Cell(row["task"]), Cell(row["method"]), Cell(f"{100 * row['before']:.1f}"), shown_percent(row)]
        for row in results["forgetting"]
    ]
    if not rows:
        return Part("forgetting", "Forgetting", ["Not measured by this preset."], [], [])
    said = [f"Accuracy on tasks that were not trained on, before and after training on {_task(results)}."]
    table = Table("Accuracy in %: mean ± standard deviation over seeds", ["task", "method", "base", "after"], rows)
    return Part("forgetting", "Forgetting", said, [], [table])


def shown_percent(row: Row) -> Cell:
    """As :func:`shown`, of an accuracy whatever the metric is."""
    if row["mean"] is None:
        return Cell(UNKNOWN)
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    return Cell(f"{100 * row['mean']:.1f}{spread}", tuple(row["runs"]))


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
    times = {row["method"]: f"{signed(100 * (row['relative'] - 1), 1)}" for row in results["overhead"]}
    cost = [
        [Cell("Qwen2 0.5B, paper"), *(Cell(f"{signed(paper['overhead'][n], 1)}") for n in names)],
        [Cell("this study"), *(Cell(times.get(n, UNKNOWN)) for n in names)],
    ]
    stops = [[Cell(m), *(Cell(f"{own[k]:.2f}") for k in ("with", "without"))] for m, own in paper["stop_rule"].items()]
    head = [named.get(n, n) for n in names]
    said = [
        "The paper's numbers are means over five question sets of other models, each the best of three seeds; ours are "
        "means over seeds. They come from notes on the paper and were not compared with its tables. Only the order of "
        "methods, and the size of differences, can be compared."
    ]
    tables = [
        Table("Accuracy in %", ["model or task", *head], rows),
        Table("More time than AdamW, in %", ["", *head], cost),
        Table("The paper's ablation of the stop rule, accuracy in %", ["model", "with", "without"], stops),
    ]
    return Part("paper", "Beside the paper's own numbers", said, [], tables)


def _task(results: Row) -> str:
    return str(next(iter(results["settings"]["preset"]["tasks"])))
