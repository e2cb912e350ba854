"""``stablelora reproduce``: a preset is measured part by part, kept as ``results.json``, and shown as pages.

::

    OUTPUT/index.html      the page           OUTPUT/width-scaling/   the study of widths
    OUTPUT/results.md      the same in text   OUTPUT/parts/           what is neither runs nor widths
    OUTPUT/results.json    every number       OUTPUT/runs/NAME/       a run directory for each run

The same command goes on where it was interrupted: finished runs and parts are not repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from stablelora_jax.config import to_dict
from stablelora_jax.runs.files import is_page
from stablelora_jax.runs.records import plain
from stablelora_jax.runs.run import run
from stablelora_jax.runs.summary import environment
from stablelora_jax.studies import comparison, reproduce_page
from stablelora_jax.studies.forgetting import forgetting, require_tasks
from stablelora_jax.studies.overhead import overhead
from stablelora_jax.studies.preset import Study, load_study
from stablelora_jax.studies.width_results import run_study
from stablelora_jax.utils import compile_cache
from stablelora_jax.utils.errors import InputError, RunError
from stablelora_jax.utils.files import as_path, read_json_object, require_replaceable, write_whole, writing
from stablelora_jax.utils.outputs import require_writable

RESULTS, TEXT, INDEX = "results.json", "results.md", "index.html"
MARK = '{\n"study": "stablelora_jax: reproduce"'  # how results.json and the files of parts begin


def reproduce(
    preset: str,
    output: str | Path,
    overrides: Sequence[str] = (),
    *,
    data: str | Path | None = None,
    find: Callable[[str], Any] = Path,
    log_fn: Callable[[str], None] = print,
    command: str | None = None,
) -> Path:
    """Measure what is not yet measured, write the pages, and return the path of ``index.html``.

    Args:
      preset: ``quick``, ``real-cpu``, ``real-gpu``, ``paper``, or a YAML file with the keys of :class:`.Preset`.
      output: a directory, made if needed. An unfinished study of the same preset goes on; files of another origin are
        refused.
      overrides: ``key=value``, of all runs.
      data: directory with the rows of each task in a directory of its name; None: the hub.
      find: gives the file of a configuration from its name.
      log_fn: takes lines of text.
      command: what the page names as its origin.

    Raises:
      InputError: an input that cannot be used, or files of another origin, or of other settings, in ``output``.
      RunError: something cannot be written.
      Interrupted: a signal came; what is finished, and the runs under way, are saved.
    """
    study = load_study(preset, as_path(output, "--output"), overrides, None if data is None else as_path(data), find)
    settings = plain({"preset": to_dict(study.preset), "overrides": list(overrides), "data": data and str(data)})
    _require_own(study.output, settings)
    compile_cache.enable()
    began = time.monotonic()
    results = measured(study, settings, log_fn)
    header: dict[str, Any] = {"study": "stablelora_jax: reproduce", "name": study.name}
    header |= {"command": command or f"reproduce {preset}", "date": datetime.now(UTC).date().isoformat()}
    header |= {"seconds": round(_earlier(study.output) + time.monotonic() - began, 1), "environment": _environment()}
    results = plain({**header, "settings": settings, **results})
    _write(study.output / RESULTS, to_text(results))
    shown = json.loads((study.output / RESULTS).read_text())
    sections = reproduce_page.sections(shown, study.output)
    _write(study.output / TEXT, reproduce_page.text(shown, sections))
    _write(study.output / INDEX, reproduce_page.page(shown, sections))
    return study.output / INDEX


def measured(study: Study, settings: dict[str, Any], log_fn: Callable[[str], None]) -> dict[str, Any]:
    """All parts; ``runs`` and ``width-scaling`` keep themselves, the others are files of ``parts/``."""
    preset = study.preset
    require_tasks(study)
    runs = comparison.Runs(study, log_fn)
    methods = comparison.compare(runs)
    rates = {row["method"]: row["rate"] for row in methods if row["task"] == study.task}
    found: dict[str, Any] = {"methods": methods, "differences": comparison.differences(runs, methods)}
    found["shrink_ratios"] = comparison.shrink_ratios(runs, rates[preset.method])
    found["ranks"] = comparison.ranks(runs, rates)
    found["terms"] = _terms(study, rates, runs)
    found["overhead"] = []
    if preset.overhead_steps:
        log_fn("overhead")
        found["overhead"] = _part(study, settings, "overhead", lambda *_: overhead(study, rates))
    found["forgetting"] = []
    if preset.forgetting:
        found["forgetting"] = _part(
            study, settings, "forgetting", lambda *given: forgetting(study, rates, log_fn, *given)
        )
    log_fn("widths")
    run_study(study.output / "width-scaling", preset.width_scaling)
    found["failed"] = runs.failed
    return found


def _terms(study: Study, rates: dict[str, float], runs: comparison.Runs) -> dict[str, str]:
    """The name of the run of each method whose terms were measured; one that fails is left out."""
    found = {}
    for method, config in comparison.looked_at(study, rates).items():
        runs.log_fn(f"terms of a step: {method}")
        name = Path(str(config.output)).name
        try:
            run(config, lambda text: None)
            found[method] = name
        except RunError as error:
            runs.failed[name] = str(error)
            runs.log_fn(f"{name} failed: {error}")
    return found


def _part(study: Study, settings: dict[str, Any], name: str, make: Callable[..., Any]) -> Any:
    """What the file of a part holds; where it is not there, ``make(kept, save)``, whose ``save()`` writes ``kept``."""
    path = study.output / "parts" / f"{name}.json"
    own = read_json_object(path) if path.is_file() else {}
    if "result" in own:
        return own["result"]
    kept = own.get("kept", {})
    head = {"study": "stablelora_jax: reproduce", "settings": settings}

    def save(**more: Any) -> None:
        _write(path, to_text(plain({**head, "kept": kept, **more})))

    result = make(kept, save)
    save(result=result)
    return result


def _require_own(output: Path, settings: dict[str, Any]) -> None:
    """Refuse what must not be replaced."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no directory: choose another --output")
    for name, mark in ((RESULTS, MARK), (INDEX, reproduce_page.MARK), (TEXT, reproduce_page.TEXT_MARK)):
        require_replaceable(output / name)
        if not is_page(output / name, mark):
            raise InputError(f"{output / name} is no file of this study: move it, or choose another --output")
    for path in (output / RESULTS, *sorted((output / "parts").glob("*.json"))):
        if path.exists() and read_json_object(path).get("settings") != settings:
            raise InputError(f"{path} has other settings than this command: choose another --output")
    require_writable(output / RESULTS, "--output")


def _earlier(output: Path) -> float:
    """Seconds of the command's earlier calls that have written results."""
    path = output / RESULTS
    return float(read_json_object(path).get("seconds", 0)) if path.exists() else 0.0


def _environment() -> dict[str, str]:
    devices = f"{jax.device_count()} x {jax.local_devices()[0].device_kind}"
    return {**environment(), "devices": devices}


def to_text(results: dict[str, Any]) -> str:
    """JSON with a line for each key, and for each row of a list."""
    parts = []
    for key, value in results.items():
        rows = isinstance(value, list) and value
        text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
