"""The page of the study of widths: one HTML file that needs no script and no network, like the page of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stablelora_jax.runs.report import render
from stablelora_jax.studies.slopes import EARLY, LATE
from stablelora_jax.studies.width_charts import charts
from stablelora_jax.studies.width_panels import signed

MARK = "<!doctype html>\n<!-- stablelora_jax: page of the study of widths -->\n"  # how the page begins
COLUMNS = (
    ("early", "delta1"),
    ("early", "delta2"),
    ("early", "delta3"),
    ("late", "delta1"),
    ("late", "delta2"),
    ("late", "az"),
    ("late", "ratio"),
)
SYMBOLS = {"az": "RMS(x\N{NO-BREAK SPACE}A)", "ratio": "delta1 /\N{NO-BREAK SPACE}delta2"}


def page(results: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
      results: the content of ``results.json``.
    """
    settings = results["settings"]
    widths = settings["widths"]
    return render(
        "width.html.jinja",
        title="LoRA across widths",
        facts=[
            ("widths", f"{widths[0]} to {widths[-1]}"),
            ("configs", str(len(settings["configs"]))),
            ("steps of a run", str(settings["steps"])),
            ("seeds", str(settings["seeds"])),
            ("time", f"{results['seconds']:.0f} s"),
        ],
        charts=charts(results),
        columns=[f"{span} {SYMBOLS.get(name, name)}" for span, name in COLUMNS],
        slopes=[
            (name, [_cell(spans[span][key]) for span, key in COLUMNS]) for name, spans in results["slopes"].items()
        ],
        configs=[_described(config) for config in settings["configs"]],
        widths=widths,
        stops=_table(results, "stop_step", lambda found: f"{sum(found) / len(found):.0f}"),
        losses=_table(results, "final_loss", lambda found: f"{sum(found) / len(found):.3f}"),
        early=f"steps {EARLY[0]} to {EARLY[1]}",
        late=f"the last {LATE} steps",
        environment=[("command", results["command"]), ("date", results["date"]), *results["environment"].items()],
    )


def _cell(slope: Mapping[str, float | None]) -> tuple[str, str]:
    """The slope with half of its interval, and theory's."""
    found, high, expected = slope["slope"], slope["high"], slope["theory"]
    assert found is not None and expected is not None
    half = "" if high is None else f" ± {high - found:.2f}"
    return signed(found) + half, signed(expected, 1)


def _described(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The exponents of a config in words."""
    eta_b = config["eta"] if config["eta_b"] is None else config["eta_b"]
    shrink = f"{config['shrink_ratio']:g}" if config["shrink_ratio"] else "none"
    exponents = (signed(value, 1) for value in (config["eta"], eta_b, config["scale"], config["a0"]))
    return config["name"], [*exponents, f"{config['e0']:g}", shrink]


def _table(results: Mapping[str, Any], key: str, shown: Callable[[list[float]], str]) -> list[tuple[str, list[str]]]:
    """A row for each config that has any value of ``key``, a column for each width."""
    rows = []
    for config in results["settings"]["configs"]:
        found = [
            [
                run[key]
                for run in results["runs"]
                if run["config"] == config["name"] and run["width"] == width and run[key] is not None
            ]
            for width in results["settings"]["widths"]
        ]
        if any(found):
            rows.append((config["name"], [shown(values) if values else "never" for values in found]))
    return rows
