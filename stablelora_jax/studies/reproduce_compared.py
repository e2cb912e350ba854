"""Sections (b), (c) and (e) of a study's page: what was compared over seeds."""

from __future__ import annotations

from stablelora_jax.studies import reproduce_charts as charts
from stablelora_jax.studies.reproduce_cells import (
    UNKNOWN,
    UNMEASURED,
    Cell,
    Part,
    Row,
    Table,
    about,
    first_task,
    sentence,
    shown,
)
from stablelora_jax.studies.width_panels import signed

SCALINGS = {"lora": "LoRA", "rslora": "rsLoRA"}


def methods(results: Row) -> Part:
    """Section (b)."""
    preset, rows = results["settings"]["preset"], results["methods"]
    chooses = ", ".join(map(str, preset["rate_seeds"]))
    said = [sentence(results, found) for found in results["differences"]]
    said += [
        f"Each method takes the learning rate with the best mean over the seeds that choose ({chooses}); a grid whose "
        "best rate is at an end is widened. No seed is chosen. The validation set also chooses the rates, so all means "
        "are a little high. Each p-value is of one comparison, on the questions that chose the rates: of several "
        "comparisons some give a small one by chance."
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
        Table(f"{about(results)}, and the best learning rate", head, values),
        _differences(results),
        *(_curve(results, task) for task in tasks),
    ]
    return Part("methods", "Methods", said, [*charts.learning_rates(results), *charts.seeds(results)], tables)


def _differences(results: Row) -> Table:
    times, _ = charts.factor(results)
    digits = 1 if times == 100 else 4
    rows, by_key = [], {(row["task"], row["method"]): row for row in results["methods"]}
    for found in results["differences"]:
        numbers = [found[key] for key in ("mean", "std", "low", "high")]
        mean, std, low, high = (UNKNOWN if x is None else signed(times * x, digits) for x in numbers)
        beyond = {None: UNKNOWN, True: "yes", False: "no"}[found["beyond"]]
        p_value = UNKNOWN if found["p_value"] is None else f"{found['p_value']:.2g}"
        name = f"{found['method']}, {found['task']}"
        runs = tuple(by_key[found["task"], found["baseline"]]["runs"]) + tuple(
            by_key[found["task"], found["method"]]["runs"]
        )
        rest = (std.lstrip("+"), beyond, f"{low} to {high}", p_value)
        rows.append([Cell(name), Cell(mean, runs), *map(Cell, rest)])
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


def shrink(results: Row) -> Part:
    """Section (c)."""
    rows = results["shrink_ratios"]
    ratios = dict.fromkeys(row["shrink_ratio"] for row in rows)
    by_key = {(row["shrink_ratio"], row["stop_rule"]): shown(results, row) for row in rows}
    cells = [[Cell(f"{r:g}"), *(by_key.get((r, stop), Cell(UNKNOWN)) for stop in (True, False))] for r in ratios]
    table = Table(about(results), ["shrink ratio", "with stop rule", "without"], cells)
    preset = results["settings"]["preset"]
    said = [f"{preset['method']} on {first_task(results)}, at its best learning rate; a ratio of 0 is no shrink."]
    if not rows:
        return Part("shrink", "Shrink ratio and stop rule", [UNMEASURED], [], [])
    drawn = charts.shrink_ratios(results) if any(row["mean"] is not None for row in rows) else []
    return Part("shrink", "Shrink ratio and stop rule", said, drawn, [table])


def ranks(results: Row) -> Part:
    """Section (e)."""
    rows = results["ranks"]
    names = list(dict.fromkeys(row["rank"] for row in rows))
    kinds = list(dict.fromkeys((row["method"], row["scaling"]) for row in rows))
    by_key = {(row["method"], row["scaling"], row["rank"]): shown(results, row) for row in rows}
    cells = [[Cell(f"{m}, {SCALINGS[s]}"), *(by_key[m, s, rank] for rank in names)] for m, s in kinds]
    said = [
        f"{first_task(results)}, at each method's best learning rate for the rank of the comparison above; the rate is "
        "not searched again for each rank, which favours that rank."
    ]
    if not rows:
        return Part("ranks", "Ranks", [UNMEASURED], [], [])
    table = Table(about(results), ["method, scaling", *(f"r = {rank}" for rank in names)], cells)
    return Part("ranks", "Ranks", said, charts.ranks(results), [table])
