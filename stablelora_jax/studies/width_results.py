"""The study of widths as a command runs it: measured once, kept as ``results.json``, shown by ``index.html``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from stablelora_jax.runs.files import is_page
from stablelora_jax.runs.summary import environment
from stablelora_jax.studies import width_page
from stablelora_jax.studies.slopes import LATE, QUANTITIES, fit, stop_step, theory, windows
from stablelora_jax.studies.width_scaling import SIZES, Config, measure
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError, named
from stablelora_jax.utils.files import as_path, read_json_object, require_replaceable, write_whole, writing
from stablelora_jax.utils.outputs import require_writable
from stablelora_jax.utils.progress import track

RESULTS, INDEX = "results.json", "index.html"
MARK = '{\n"study": "stablelora_jax: width scaling"'  # how results.json begins
CURVES = ("delta1", "delta2", "delta3", "shrink", "az", "b")
VERSIONS = ("python", "stablelora-jax", "jax", "jaxlib", "optax")
DIGITS = 4  # of what results.json says of a run
EVERY = 20  # steps between points of the curves


@checked
def run_study(output: str | Path, size: str = "full") -> Path:
    """Measure, unless ``output`` has the results of the same settings; draw the page and return its path.

    Args:
      output: a directory, made if needed. The page of an earlier study is replaced, files of another origin are not.
      size: ``full``, 12 configs at widths 64 to 4096 (about two minutes on two cores), or ``test``, seconds.

    Raises:
      InputError: an unknown size; ``output`` is no directory, holds a file of another origin under one of the two
        names, or results that are damaged or of other settings.
      RunError: a file cannot be written.
    """
    if size not in SIZES:
        raise InputError(f"size must be one of {', '.join(SIZES)}, not {size!r:.40}")
    output = as_path(output, "--output")
    results = _finished(output, size)
    if results is None:
        require_writable(output / RESULTS, "--output")
        results = study(size, f"stablelora width-scaling --output {output} --size {size}")
        _write(output / RESULTS, to_text(results))
    _write(output / INDEX, _page(output / RESULTS, results, size))
    return output / INDEX


def _finished(output: Path, size: str) -> dict[str, Any] | None:
    """The results in ``output``, where there are some; refuses what must not be replaced."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no directory: choose another --output")
    for name, mark in ((RESULTS, MARK), (INDEX, width_page.MARK)):
        require_replaceable(output / name)
        if not is_page(output / name, mark):
            raise InputError(f"{output / name} is no file of this study: move it, or choose another --output")
    if not (output / RESULTS).exists():
        return None
    found = read_json_object(output / RESULTS)
    if found.get("settings") != settings(size):
        raise InputError(f"{output / RESULTS} has other settings than --size {size}: choose another --output")
    return found


def _page(path: Path, results: Mapping[str, Any], size: str) -> str:
    """The page of results that were read from ``path``, or are new."""
    try:
        if [(run["config"], run["width"], run["seed"]) for run in results["runs"]] != [
            (config.name, width, seed) for config, width, seed in _keys(size)
        ]:
            raise ValueError("runs are missing")
        return width_page.page(results)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged ({named(error)}): remove it to measure again") from None


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def settings(size: str) -> dict[str, Any]:
    """What determines the results, as JSON has it."""
    given = SIZES[size]._asdict() | {"size": size, "configs": [asdict(config) for config in SIZES[size].configs]}
    made: dict[str, Any] = json.loads(json.dumps(given))
    return made


def study(size: str, command: str) -> dict[str, Any]:
    """Measure every config, width and seed: the content of ``results.json``."""
    chosen, began = SIZES[size], time.monotonic()
    points = curve_steps(chosen.steps)
    runs = [one(*key, chosen.steps, points) for key in track(_keys(size), "width scaling", "runs")]
    return {
        "study": "stablelora_jax: width scaling",
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.monotonic() - began, 1),
        "environment": _environment(),
        "settings": settings(size),
        "slopes": {config.name: slopes(config, runs) for config in chosen.configs},
        "steps": [int(step) for step in points],
        "runs": runs,
    }


def _keys(size: str) -> list[tuple[Config, int, int]]:
    """Config, width and seed of every run, in their order."""
    chosen = SIZES[size]
    return [(c, width, seed) for c in chosen.configs for width in chosen.widths for seed in range(chosen.seeds)]


def _environment() -> dict[str, str]:
    found = environment()
    return {name: found[name] for name in VERSIONS if name in found} | {"cpu cores": str(os.cpu_count())}


def curve_steps(steps: int) -> np.ndarray:
    """The steps, from 1, whose values are kept: the first six, the tenth, and every 20th."""
    return np.unique([*range(1, 7), 10, *range(EVERY, steps + 1, EVERY), steps])


def one(config: Config, width: int, seed: int, steps: int, points: np.ndarray) -> dict[str, Any]:
    """One run: its windows, the step in which it stopped shrinking, and its curves at ``points``.

    The loss of a point is the mean over the steps since the point before it, as that of one batch is noisy.
    """
    measured = measure(config, width, seed, steps)
    means = windows(measured)
    losses = [part.mean() for part in np.split(measured["loss"], points[:-1])]
    return {
        "config": config.name,
        "width": width,
        "seed": seed,
        "stop_step": stop_step(measured),
        "final_loss": _short(measured["loss"][-LATE:].mean()),
        "windows": {span: {name: _short(value) for name, value in found.items()} for span, found in means.items()},
        "curves": {name: [_short(value) for value in measured[name][points - 1]] for name in CURVES}
        | {"loss": [_short(value) for value in losses]},
    }


def slopes(config: Config, runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``{window: {quantity: {slope, low, high, theory}}}``; a window that not every run has is left out."""
    own = [run for run in runs if run["config"] == config.name]
    widths = [run["width"] for run in own]
    spans = [span for span in theory(config) if all(span in run["windows"] for run in own)]
    return {
        span: {
            name: {key: None if value is None else round(value, 6) for key, value in fitted._asdict().items()}
            | {"theory": theory(config)[span][name]}
            for name in (*QUANTITIES, "ratio")
            for fitted in [fit(widths, [run["windows"][span][name] for run in own])]
        }
        for span in spans
    }


def to_text(results: Mapping[str, Any]) -> str:
    """JSON with a line for each key and each run."""
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "runs"]
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in results["runs"])
    return "{\n" + ",\n".join([*parts, f'"runs": [\n{runs}\n]']) + "\n}\n"


def _short(value: Any) -> float:
    return float(f"{value:.{DIGITS}g}")
