"""``stablelora sweep``: a grid of runs as jobs side by side, and a table of their results.

::

    output: runs/rates            # one run directory for each point, jobs.json, results.json, results.md
    at_once: 8
    common: {steps: 200, batch_size: 8}
    grid:
      optimizer: [adamw, {name: stable_lora, shrink_ratio: 1e-3}]
      optimizer.learning_rate: [1e-4, 2e-4, 4e-4]
      seed: [0, 1, 2]

A point is named after what it takes: ``adamw,learning_rate=0.0001,seed=0``. Points that are finished are not repeated,
and values may be added to the grid. Points whose base or parametrization differ are trained one group after another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from stablelora_jax import config
from stablelora_jax.config import Section, option, section, to_dict
from stablelora_jax.config.keys import PositiveInt
from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs.file import JobsConfig, as_overrides
from stablelora_jax.jobs.kinds import SAME, SAME_LORA
from stablelora_jax.jobs.run import train_jobs
from stablelora_jax.jobs.shards import SHARDS, gather
from stablelora_jax.jobs.space import Search
from stablelora_jax.jobs.spread import Spread, train_spread
from stablelora_jax.utils.errors import InputError

MOST = 10_000  # points
CHARACTERS = re.compile(r"[^A-Za-z0-9._=+-]+")


@dataclass(frozen=True)
class SweepConfig(Section):
    """A grid of runs."""

    output: str = option("runs/sweep", "directory of the points' run directories and of the results")
    at_once: PositiveInt = option(8, "number of points that are trained side by side")
    tokens: PositiveInt | None = option(None, "tokens of a pass over the base; null: chosen from the first batches")
    config: str | None = option(None, "a YAML file or the name of a configuration; null: all defaults")
    common: Mapping[str, Any] = option({}, "keys of all points")
    grid: Mapping[str, tuple[Any, ...]] = option({}, "keys, dotted or of a section, and the values that each takes")
    search: Search | None = section(lambda: None, "choose the points by Optuna instead of a grid")
    space: Mapping[str, Mapping[str, Any]] = option({}, "of a search: keys, and the range or the choices of each")
    ray: Spread | None = section(lambda: None, "train on workers of Ray; null: in this process")


class Point(NamedTuple):
    """A point of the grid: its values by key, and its run."""

    values: Mapping[str, Any]
    config: RunConfig


def load_sweep(
    path: Path, overrides: Sequence[str] = (), find: Callable[[str], Any] = Path
) -> tuple[SweepConfig, dict[str, Point]]:
    """The file, and the points by name, in the order of the grid; a search has none yet.

    Args:
      path: of the YAML file.
      overrides: ``key=value``, for all points.
      find: gives the file of a configuration from its name.

    Raises:
      InputError: no such file, key or value, an empty grid, or two points of one name; one line.
    """
    sweep: SweepConfig = config.load(SweepConfig, path)
    if sweep.search is not None or sweep.space:
        if sweep.grid or sweep.search is None or not sweep.space:
            raise InputError(f"{path}: a search has the keys search and space, and a grid has grid: name one of them")
        return sweep, {}
    count = 1
    for key, values in sweep.grid.items():
        if not values:
            raise InputError(f"{path}: grid.{key} is empty: name at least one value")
        count *= len(values)
    if not sweep.grid or count > MOST:
        raise InputError(f"{path}: grid has {count if sweep.grid else 0} points: name between 1 and {MOST}")
    found: dict[str, Point] = {}
    make = point_maker(path, sweep, overrides, find)
    for values in itertools.product(*sweep.grid.values()):
        own = dict(zip(sweep.grid, values, strict=True))
        name = ",".join(label(key, value) for key, value in own.items())[:200]
        if name in found:
            raise InputError(f"{path}: two points of the grid are called {name}: leave one of them out")
        found[name] = make(name, own)
    return sweep, found


def point_maker(
    path: Path, sweep: SweepConfig, overrides: Sequence[str] = (), find: Callable[[str], Any] = Path
) -> Callable[[str, Mapping[str, Any]], Point]:
    """A function that gives a point from its name and its values; the arguments are those of :func:`load_sweep`."""
    base = None if sweep.config is None else find(sweep.config)

    def make(name: str, own: Mapping[str, Any]) -> Point:
        keys = {key: {"name": value} if _is_member(key, value) else value for key, value in own.items()}
        given = [*as_overrides(sweep.common), *as_overrides(keys), *overrides, f"output={Path(sweep.output) / name}"]
        try:
            return Point(own, config.load(RunConfig, base, given))
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from None

    return make


def label(key: str, value: Any) -> str:
    """What a point is called after one of its values.

    Example::

      >>> label("optimizer", {"name": "stable_lora", "shrink_ratio": 0.001}), label("lora.rank", 8)
      ('stable_lora+shrink_ratio=0.001', 'rank=8')
    """
    if _is_member(key, value):
        return str(value)
    if isinstance(value, Mapping):
        rest = [label(name, own) for name, own in value.items() if name != "name"]
        text = "+".join([*([str(value["name"])] if "name" in value else []), *rest])
    else:
        text = f"{key.rsplit('.', 1)[-1]}={value}"
    return CHARACTERS.sub("_", text)


def _is_member(key: str, value: Any) -> bool:
    """Whether ``value`` names a section, as in ``optimizer: adamw``."""
    return key in ("optimizer", "schedule", "task") and isinstance(value, str)


def run_sweep(
    sweep: SweepConfig, points: Mapping[str, Point], log_fn: Callable[[str], None] = print
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Train the points that are not finished; summaries and failures by name.

    Raises:
      InputError: an input that cannot be used.
      Interrupted: a signal came; all points under way are saved.
    """
    jobs = JobsConfig(**{key: getattr(sweep, key) for key in ("output", "at_once", "tokens")})
    configs = {name: point.config for name, point in points.items()}
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    if sweep.ray is not None:
        done, failed = train_spread(sweep.ray, jobs, groups(points), configs, log_fn)
    else:
        if (Path(sweep.output) / SHARDS).is_dir():  # some points were trained by workers
            gather(Path(sweep.output), configs).write()
        for names in groups(points):
            summaries, reasons = train_jobs(jobs, {name: configs[name] for name in names}, log_fn)
            done, failed = done | summaries, failed | reasons
    return {name: done[name] for name in points if name in done}, failed


def groups(points: Mapping[str, Point]) -> Iterator[list[str]]:
    """The names of points that can be trained side by side, group after group."""
    found: dict[str, list[str]] = {}
    for name, point in points.items():
        bare = replace(point.config, output=None)
        same = [to_dict(bare)[key] for key in SAME] + [getattr(bare.lora, key) for key in SAME_LORA]
        found.setdefault(repr(same), []).append(name)
    yield from found.values()
