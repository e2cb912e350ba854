"""A search: batches of trials that Optuna chooses from the results so far, each trained side by side as a sweep.

``trials.json`` has the trials of each batch, and the results are in the run directories. Whatever ends the process, the
same command reads the trials there, goes on with those under way, and asks for those that are left.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stablelora_jax.config import to_dict
from stablelora_jax.jobs.cluster import cluster
from stablelora_jax.jobs.space import Axis, Drawn, Search, ask, axes_of, corners, require_optuna, values_of
from stablelora_jax.jobs.sweep import Point, SweepConfig, run_sweep
from stablelora_jax.jobs.sweep_table import SEED, is_lower_better, metric_of, rows
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import read_json_object, write_whole, writing

TRIALS, MARK = "trials.json", "stablelora_jax search"
Make = Callable[[str, Mapping[str, Any]], Point]


def run_search(
    sweep: SweepConfig, make: Make, log_fn: Callable[[str], None] = print
) -> tuple[dict[str, Point], dict[str, dict[str, Any]], dict[str, str]]:
    """Train all trials, or go on with them; the points of the trials, summaries and failures, by name.

    Args:
      sweep: the file, with ``search`` and ``space``.
      make: gives a point from its name and its values, as :func:`stablelora_jax.jobs.sweep.point_maker`.
      log_fn: takes lines of text.

    Raises:
      InputError: an input that cannot be used, or Optuna is not installed.
      Interrupted: a signal came; all points under way are saved.
    """
    require_optuna()
    assert sweep.search is not None
    axes = axes_of(sweep.space)
    _require_runs(sweep.search, axes, make)
    course = _Course(sweep, sweep.search, axes, make, log_fn, _read(sweep))
    ray = sweep.ray
    with cluster(ray.address, ray.cpus_per_worker, ray.gpus_per_worker, log_fn) if ray else nullcontext():
        course.run()
    return course.points, course.done, course.failed


@dataclass
class _Course:
    """Batch after batch."""

    sweep: SweepConfig
    search: Search
    axes: Mapping[str, Axis]
    make: Make
    log_fn: Callable[[str], None]
    batches: list[list[Drawn]]  # that have been asked for
    drawn: list[Drawn] = field(default_factory=list)  # of all trials so far
    points: dict[str, Point] = field(default_factory=dict)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Train all trials."""
        for number in itertools.count():
            left = self.search.trials - len(self.drawn)
            if not left:
                return
            if number == len(self.batches):
                self.batches.append(self._ask(left))
                _write(self.sweep, self.batches)
            batch = self.batches[number][:left]
            own = points_of(self.search, self.axes, self.make, batch, len(self.drawn))
            summaries, reasons = run_sweep(self.sweep, own, self.log_fn)
            self.drawn, self.points = self.drawn + batch, self.points | own
            self.done, self.failed = self.done | summaries, self.failed | reasons

    def _ask(self, left: int) -> list[Drawn]:
        """A batch that fills all slots, told all results so far."""
        metric = metric_of(self.points, self.done)
        values = [float(row["mean"]) for row in rows(self.points, self.done, self.failed)]
        slots = self.sweep.at_once * (self.sweep.ray.workers if self.sweep.ray else 1)
        count = min(left, max(1, slots // max(1, len(self.search.seeds))))
        told = list(zip(self.drawn, values, strict=True))
        return ask(self.axes, self.search, told, count, is_lower_better(metric))


def points_of(
    search: Search, axes: Mapping[str, Axis], make: Make, batch: Sequence[Drawn], first: int
) -> dict[str, Point]:
    """The points by name of the trials ``first``, ``first + 1``, ...: one for each seed."""
    found = {}
    for number, drawn in enumerate(batch, first):
        values = values_of(axes, drawn)
        for seed in search.seeds or (None,):
            name = f"trial-{number:04d}" + ("" if seed is None else f",seed={seed}")
            own = values if seed is None else {**values, SEED: seed}
            found[name] = make(name, own)._replace(values={"trial": number, **own})
    return found


def _require_runs(search: Search, axes: Mapping[str, Axis], make: Make) -> None:
    """Check that the ends of the space are configurations of runs.

    Raises:
      InputError: some key or value is none, or ``seed`` is named twice.
    """
    if search.seeds and SEED in axes:
        raise InputError("space.seed and search.seeds exclude each other: leave one of them out")
    points_of(search, axes, make, corners(axes), 0)


def _header(sweep: SweepConfig) -> Any:
    """What decides the trials, as JSON has it."""
    assert sweep.search is not None
    search = {key: value for key, value in to_dict(sweep.search).items() if key != "trials"}
    return json.loads(json.dumps({"made_by": MARK, "search": search, "space": to_dict(sweep)["space"]}))


def _read(sweep: SweepConfig) -> list[list[Drawn]]:
    """The batches that have been asked for.

    Raises:
      InputError: ``trials.json`` is damaged, or of another search.
    """
    path = Path(sweep.output) / TRIALS
    if not path.exists():
        return []
    own = read_json_object(path)
    for key, value in _header(sweep).items():
        if own.get(key) != value:
            raise InputError(f"{path} is of a search with another {key}: choose another output, or put it back")
    batches = own.get("batches")
    if not isinstance(batches, list) or not all(isinstance(batch, list) and batch for batch in batches):
        raise InputError(f"{path} is damaged: move it, and choose another output")
    return batches


def _write(sweep: SweepConfig, batches: Sequence[Sequence[Drawn]]) -> None:
    path = Path(sweep.output) / TRIALS
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**_header(sweep), "batches": batches}, indent=1) + "\n")
