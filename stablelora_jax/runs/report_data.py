"""What a run's directory records, as the texts of its page: status, results, configuration, environment, samples."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stablelora_jax import config
from stablelora_jax.config.run import RunConfig
from stablelora_jax.runs.curves import Curves, ratios_of, read_curves
from stablelora_jax.runs.directory import read_summary
from stablelora_jax.runs.files import CONFIG, METRICS, SUMMARY, has_adapter
from stablelora_jax.runs.history import History, read_history
from stablelora_jax.runs.trackers import dotted, settings
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path


class RunRecord(NamedTuple):
    """All that is known of a run."""

    path: Path
    curves: Curves
    history: History
    summary: dict[str, Any]  # empty until the run has ended
    settings: dict[str, Any]  # by dotted key


class Setting(NamedTuple):
    """A row of the configuration."""

    key: str
    value: str
    default: str | None  # where it is another one


class Fact(NamedTuple):
    """A result."""

    term: str
    value: str
    note: str


def read_run(directory: Path) -> RunRecord:
    """Read a run, finished or not.

    Raises:
      InputError: the directory is no run's, or a file in it is damaged.
    """
    directory = as_path(directory, "a run")
    if not directory.is_dir():
        raise InputError(f"there is no run directory {directory}")
    if not (directory / METRICS).is_file():
        raise InputError(f"{directory} has no {METRICS}: it is no run directory, or its run has not begun")
    curves = read_curves(directory)
    history = read_history(directory / METRICS, 2**63)
    if not (len(curves.steps) or history.data is not None or (directory / CONFIG).is_file()):
        raise InputError(f"{directory / METRICS} holds no record of a run")
    return RunRecord(directory, curves, history, read_summary(directory) or {}, settings(directory))


def status(run: RunRecord) -> tuple[str, str]:
    """(kind, text): ``finished``, ``early`` or ``open``, and what to tell the reader."""
    planned, done = run.settings.get("steps"), last_step(run)
    if run.summary.get("stopped_early"):
        return "early", f"stopped early, at step {run.summary.get('steps')} of {planned}"
    if run.summary:
        return "finished", f"finished, {run.summary.get('steps')} steps"
    of = f" of {planned}" if planned is not None and run.settings.get("epochs") is None else ""
    return "open", f"not finished: {done}{of} steps so far"


def last_step(run: RunRecord) -> int:
    """The last step that was logged, 0 before the first."""
    return int(run.curves.steps[-1]) if len(run.curves.steps) else 0


def facts(run: RunRecord) -> list[Fact]:
    """The results in a few numbers."""
    found = [Fact("Training loss", number(_last_mean(run)), "mean of the last 10 steps")]
    before, after = ends(run)
    for key, term, form in (("loss", "Held-out loss", number), ("acc", "Held-out accuracy", percent)):
        if after is not None and key in after:
            known = after is not before and before is not None and key in before
            note = f"{form(before[key])} before training" if known and before else "before training"
            found.append(Fact(term, form(after[key]), note if known or after is before else ""))
    if run.curves.has_stop_rule:
        pairs, steps = len(ratios_of(run.curves).names), [step for step, _ in run.curves.stops]
        of = f" of {pairs}" if pairs else ""
        found.append(Fact("Pairs that stopped shrinking", f"{len(steps)}{of}", _span(steps)))
    found.append(Fact("Skipped steps", str(len(run.curves.skipped)), ""))
    if "minutes" in run.summary:
        found.append(Fact("Minutes", number(run.summary["minutes"]), "of the last start"))
    return found


def ends(run: RunRecord) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The evaluation before training and the last one so far; None where there is none."""
    steps = sorted(run.history.evaluations)
    if not steps:
        return None, None
    return run.history.evaluations.get(0), run.history.evaluations[steps[-1]]


def evaluations(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows) of all evaluations."""
    known = (("loss", number), ("acc", percent), ("acc_norm", percent))
    used = [(key, form) for key, form in known if any(key in e for e in run.history.evaluations.values())]
    rows = [
        [str(step), *(form(found.get(key)) for key, form in used)]
        for step, found in sorted(run.history.evaluations.items())
    ]
    return ["step", *(key for key, _ in used)], rows


def questions(run: RunRecord) -> str:
    """`` (400 questions)``, or nothing where none were asked."""
    count = (ends(run)[1] or {}).get("questions")
    return f" ({count} questions)" if count else ""


def configuration(run: RunRecord) -> list[Setting]:
    """Every key with its value, and the default where that is another; no defaults where the file is too old."""
    try:
        loaded = config.load(RunConfig, run.path / CONFIG, accept_old_names=True) if run.settings else None
    except InputError:
        loaded = None
    if loaded is None:
        return [Setting(key, text(value), None) for key, value in run.settings.items()]
    own = dotted(config.to_dict(loaded))
    standard = _defaults(own)
    known = [(key, value, standard.get(key, value)) for key, value in own.items() if key != "output"]
    return [Setting(key, text(value), None if value == usual else text(usual)) for key, value, usual in known]


def environment(run: RunRecord) -> list[tuple[str, str]]:
    """Dates, devices and versions, as far as they are recorded."""
    found = dict(run.summary.get("environment") or {}) if isinstance(run.summary.get("environment"), dict) else {}
    starts = _starts(run.path)
    rows = [("directory", str(run.path))]
    rows += [("started", starts[0])] if starts else []
    rows += [("resumed", ", ".join(starts[1:]))] if len(starts) > 1 else []
    rows += [("ended", _date((run.path / SUMMARY).stat().st_mtime))] if run.summary else []
    rows += [(key, text(run.summary[key])) for key in ("devices", "processes") if key in run.summary]
    rows += [(key, text(value)) for key, value in ({"jax": run.summary.get("jax")} | found).items() if value]
    return rows + [("adapter", "saved" if has_adapter(run.path) else "not saved yet")]


def data(run: RunRecord) -> list[tuple[str, str]]:
    """The statistics of the training data."""
    return [(key.replace("_", " "), text(value)) for key, value in (run.history.data or {}).items()]


def samples(run: RunRecord) -> list[dict[str, str]]:
    """Questions with the right answer and those before and after training; empty until the run has ended."""
    keys = ("prompt", "right", "before", "after")
    found = run.summary.get("samples")
    rows = found if isinstance(found, list) else []
    return [{key: str(row[key]) for key in keys} for row in rows if isinstance(row, dict) and set(keys) <= row.keys()]


def number(value: Any) -> str:
    """Four significant digits."""
    return "–" if not isinstance(value, int | float) or value != value else f"{value:.4g}"


def percent(value: Any) -> str:
    """A share as a percentage with one decimal."""
    return "–" if not isinstance(value, int | float) or value != value else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def text(value: Any) -> str:
    """A value as YAML writes it, in one line."""
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n").removesuffix("\n...")


def _defaults(own: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with no key given but the names that choose members."""
    names = [f"{key}={text(value)}" for key, value in own.items() if key.endswith(".name")]
    try:
        return dict(dotted(config.to_dict(config.load(RunConfig, None, names))))
    except InputError:  # a member with required keys
        return dict(dotted(config.to_dict(RunConfig())))


def _span(steps: list[int]) -> str:
    if not steps:
        return ""
    return f"at step {steps[0]}" if min(steps) == max(steps) else f"from step {min(steps)} to {max(steps)}"


def _last_mean(run: RunRecord) -> float | None:
    if "loss_last_10" in run.summary:
        value = run.summary["loss_last_10"]
        return value if isinstance(value, int | float) else None
    tail = [float(loss) for loss in run.curves.series["loss"][-10:] if loss == loss]
    return sum(tail) / len(tail) if tail else None


def _starts(directory: Path) -> list[str]:
    """When the run was started and resumed, from the names of TensorBoard's files."""
    times = []
    for path in (directory / "tensorboard").glob("events.out.tfevents.*"):
        stamp = path.name.split(".")[3]
        if stamp.isdigit() and len(stamp) == 19:  # nanoseconds
            times.append(int(stamp) // 10**9)
    return [_date(t) for t in sorted(times)]


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
