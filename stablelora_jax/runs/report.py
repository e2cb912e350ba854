"""The page of one run or of several: one HTML file that needs nothing else, neither a network nor other files.

The template is ``assets/report/page.html.jinja``. All texts pass through its autoescape: a prompt or a path may hold
anything. The page works without scripts; it has light and dark colours and reads on a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import stablelora_jax
from stablelora_jax.runs import panels, ratio_panel, report_data
from stablelora_jax.runs.curves import labels, ratios_of
from stablelora_jax.runs.files import is_page
from stablelora_jax.runs.report_charts import Chart, chart
from stablelora_jax.runs.report_data import Fact, RunRecord
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, require_replaceable, write_whole, writing

TEMPLATES = Path(stablelora_jax.__file__).parent / "assets" / "report"


@checked
def write_page(runs: Sequence[Path], output: Path) -> Path:
    """Write the page of ``runs`` to the file ``output``, in one step, and return its path.

    Args:
      runs: directories of runs, finished or not; several are shown in the same charts, too.
      output: a file, whose directory is made if needed. A page that was written before is replaced, nothing else.

    Raises:
      InputError: no runs; a directory that is no run; ``output`` is there and is no such page.
      RunError: it cannot be written.
    """
    if not runs:
        raise InputError("name at least one run directory")
    output = as_path(output, "--output")
    require_replaceable(output)
    if not is_page(output):
        raise InputError(f"{output} is no page of runs: move it, or name another file with --output")
    text = page([report_data.read_run(Path(run)) for run in runs])
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    return output


def page(runs: Sequence[RunRecord]) -> str:
    """The page as text."""
    names = labels([run.path for run in runs])
    several = len(runs) > 1
    names = [f"{i}: {name}" for i, name in enumerate(names, 1)] if several else names
    return render(
        "page.html.jinja",
        title=f"{len(runs)} runs" if several else f"Run {names[0]}",
        together=_together(runs, names) if several else None,
        runs=[_one(f"run-{i}", run, name) for i, (run, name) in enumerate(zip(runs, names, strict=True), 1)],
    )


def render(template: str, **values: Any) -> str:
    """A page from a template of ``assets/report``; every text passes through autoescape."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values)


def _one(identity: str, run: RunRecord, name: str) -> dict[str, Any]:
    """What the template shows of a run."""
    kind, said = report_data.status(run)
    head, rows = report_data.evaluations(run)
    settings = report_data.configuration(run)
    return {
        "id": identity,
        "name": name,
        "kind": kind,
        "status": said,
        "facts": report_data.facts(run),
        "charts": _charts(identity, run),
        "skipped": run.curves.skipped,
        "head": head,
        "evaluations": rows,
        "questions": report_data.questions(run),
        "samples": report_data.samples(run),
        "finished": kind != "open",
        "settings": settings,
        "changed": [row for row in settings if row.default is not None],
        "environment": report_data.environment(run),
        "data": report_data.data(run),
    }


def _charts(identity: str, run: RunRecord) -> list[Chart]:
    """The charts of one run; none where nothing was logged."""
    curves = run.curves
    if not len(curves.steps):
        return []

    def of(key: str, title: str, caption: str, draw: Callable[..., None]) -> Chart:
        return chart(f"{identity}-{key}", title, caption, partial(draw, curves=curves))

    seen = "Dots: held-out data. They should fall with the curve; where they rise, the run overfits."
    made = [of("loss", "Loss on the answer tokens", seen if curves.evaluations else "No held-out loss.", panels.loss)]
    if len(curves.accuracies) > 1:
        made.append(
            of(
                "accuracy",
                "Accuracy on held-out questions",
                "Share of the questions whose right answer has the highest likelihood; step 0 is the base model.",
                _accuracy,
            )
        )
    if len(ratios_of(curves).steps):
        made.append(
            of("ratio", "The ratio that ends the shrinking of A", ratio_panel.caption(curves), ratio_panel.ratio)
        )
    bands = "Lines: mean over the pairs; bands: least to greatest."
    stops = " Marked along the axis: where pairs stop shrinking." if curves.stops else ""
    made.append(of("norms", "Norms of A and B", bands + stops, panels.norms))
    if curves.stability:
        seen = "Learning is stable where delta1 to delta3 neither vanish nor explode. Delta1 far above: A is too large."
        made.append(of("terms", "What a step changes at the modules' outputs (RMS)", seen, panels.terms))
        seen = "Both sides of the stop rule: shrinking ends where the curves of a pair meet."
        made.append(of("widths", "Norms over widths", seen, panels.widths))
    return made


def _accuracy(axes: Any, curves: Any) -> None:
    axes.plot(*panels.columns(curves.accuracies), "o-", color=panels.BLUE, label="accuracy")
    axes.set(xlabel="step", ylabel="share of questions", ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def _together(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any]:
    """Charts and tables that hold all runs."""
    drawn = [run for run in runs if len(run.curves.steps)]
    seen = "Training loss, smoothed; dots: held-out data."
    charts = [chart("all-loss", "Loss of the runs", seen, partial(_losses, runs, names))] if drawn else []
    if any(len(ratios_of(run.curves).steps) for run in runs):
        seen = "Median over the pairs; bands: the middle half. Where a run has a stop rule, A shrinks until 1."
        charts.append(chart("all-ratio", "The ratio that ends the shrinking of A", seen, partial(_ratios, runs, names)))
    keys = [{fact.term: _with_note(fact) for fact in report_data.facts(run)} for run in runs]
    terms = list(dict.fromkeys(term for one in keys for term in one))
    configurations = [{row.key: row.value for row in report_data.configuration(run)} for run in runs]
    every = dict.fromkeys(key for one in configurations for key in one)
    differing = [key for key in every if len({one.get(key) for one in configurations}) > 1]
    return {
        "charts": charts,
        "results": [(term, [one.get(term, "–") for one in keys]) for term in terms],
        "differing": [(key, [one.get(key, "–") for one in configurations]) for key in differing],
    }


def _with_note(fact: Fact) -> str:
    return f"{fact.value} ({fact.note})" if fact.note else fact.value


def _losses(runs: Sequence[RunRecord], names: Sequence[str], axes: Any) -> None:
    axes.set_prop_cycle(panels.run_styles())
    every: list[float] = []
    for run, name in zip(runs, names, strict=True):
        steps, curve = panels.thin(run.curves.steps, panels.smooth(run.curves.series["loss"]))
        (line,) = axes.plot(steps, curve, label=name)
        axes.plot(*panels.columns(run.curves.evaluations), "o", markersize=4, color=line.get_color())
        every += [*curve, *(loss for _, loss in run.curves.evaluations)]
    axes.set(xlabel="step", ylabel="nats per token", yscale=panels.scale(every))
    panels.plain_log_ticks(axes)
    axes.grid(alpha=0.3)


def _ratios(runs: Sequence[RunRecord], names: Sequence[str], axes: Any) -> None:
    axes.set_prop_cycle(panels.run_styles())
    found = [ratio_panel.quartiles(run.curves) for run in runs]
    for (steps, low, middle, high), name in zip(found, names, strict=True):
        (line,) = axes.plot(steps, middle, label=name)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    axes.axhline(1, color=panels.GRAY, linestyle="--", linewidth=1.2, label="ratio 1: shrinking stops")
    values = np.concatenate([middle for _, _, middle, _ in found])
    axes.set(xlabel="step", ylabel="(||A|| / in) / (||B|| / out)", yscale="log", ylim=ratio_panel.limits(values))
    panels.plain_log_ticks(axes)
    axes.grid(alpha=0.3)
