"""What ``stablelora reproduce`` measures: a YAML file of ``assets/studies``, or one of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import stablelora_jax
from stablelora_jax import config
from stablelora_jax.config import Section, option, to_dict
from stablelora_jax.config.keys import NonNegativeInt, PositiveFloat, PositiveInt
from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs.file import NAME, as_overrides
from stablelora_jax.utils.errors import InputError

FOLDER = Path(stablelora_jax.__file__).parent / "assets" / "studies"
PRESETS = ("quick", "real-cpu", "real-gpu", "paper")
OWN = ("seed", "output", "optimizer", "optimizer.name", "optimizer.learning_rate", "task", "task.name", "task.path")
DISTINCT = ("learning_rates", "rate_seeds", "seeds", "shrink_ratios", "ranks")
LONGEST = 60  # characters of the name of a task or a method
RATE, SEED, RATIO, STOP = "optimizer.learning_rate", "seed", "optimizer.shrink_ratio", "optimizer.stop_rule"
Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Preset(Section):
    """The runs of a study. Tasks, methods, rates and seeds are compared in full; the rest on the first task alone."""

    config: str | None = option(None, "a YAML file or the name of a configuration; null: all defaults")
    common: Mapping[str, Any] = option({}, "keys of all runs")
    tasks: Mapping[str, Mapping[str, Any]] = option({}, "tasks by name: keys of their runs")
    methods: Mapping[str, Mapping[str, Any]] = option({}, "methods by name: keys of their runs")
    baseline: str = option("AdamW", "the method that the others are compared with")
    method: str = option("Stable-LoRA", "the method that is looked at closely; it has a shrink_ratio")
    metric: Literal["acc", "loss"] = option("acc", "what is compared: accuracy or loss on the validation set")
    learning_rates: tuple[PositiveFloat, ...] = option((), "learning rates to begin with, ascending")
    widen: NonNegativeInt = option(2, "rates that may be added at each end while the best rate is at that end")
    rate_seeds: tuple[NonNegativeInt, ...] = option((0, 1, 2), "seeds whose mean chooses the learning rate")
    seeds: tuple[NonNegativeInt, ...] = option((0, 1, 2), "seeds that are compared at the best learning rate")
    shrink_ratios: tuple[float, ...] = option((), "shrink ratios, each with and without the stop rule; 0 is AdamW")
    ranks: tuple[PositiveInt, ...] = option((), "ranks, each with the scaling of LoRA and of rsLoRA")
    stability_every: PositiveInt = option(5, "steps between measurements of a step's terms")
    overhead_steps: NonNegativeInt = option(10, "steps of a timing; 0 for none")
    overhead_rounds: PositiveInt = option(7, "timings of each method, taken in turns")
    forgetting: tuple[str, ...] = option((), "tasks that are not trained on, evaluated before and after")
    forgetting_limit: PositiveInt | None = option(None, "use only the first rows of these tasks")
    width_scaling: Literal["full", "test"] = option("test", "size of the study of widths")
    at_once: PositiveInt = option(12, "number of runs that are trained side by side")


class Point(NamedTuple):
    """A run of the study."""

    name: str  # also of its directory
    config: RunConfig


class Study(NamedTuple):
    """A preset and where it is measured."""

    name: str
    preset: Preset
    output: Path
    overrides: Sequence[str]  # key=value, of all runs
    data: Path | None  # has the rows of a task in a directory of its name; None: the hub
    base: str | None  # the file of preset.config

    @property
    def task(self) -> str:
        """The task of everything but the comparison of methods."""
        return next(iter(self.preset.tasks))

    def point(self, task: str, method: str, rate: float, seed: int, own: Keys | None = None) -> Point:
        """A run, named after what it is; keys in ``own`` that say what holds anyway are left out.

        Raises:
          InputError: a key or value that no run has.
        """
        given = [*as_overrides(self.preset.common), *as_overrides(self.preset.tasks[task])]
        given += [*as_overrides(self.preset.methods[method]), *self.overrides, f"{RATE}={rate!r}", f"{SEED}={seed}"]
        usual = to_dict(config.load(RunConfig, self.base, given))
        if self.data is not None and "path" in usual["task"]:
            rows = usual["task"]["name"]
            given += as_overrides({"task.path": str(self.data if rows == "merged_qa" else self.data / rows)})
        more = {key: value for key, value in (own or {}).items() if _get(usual, key) != value}
        labels = [task, method, f"lr={rate!r}", *(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in more.items())]
        name = ",".join([*labels, f"seed={seed}"])
        given += as_overrides({**more, "output": str(self.output / "runs" / name)})
        return Point(name, config.load(RunConfig, self.base, given))


def load_study(
    name: str, output: Path, overrides: Sequence[str], data: Path | None, find: Callable[[str], Any] = Path
) -> Study:
    """The study of a preset of :data:`PRESETS`, or of a YAML file.

    Raises:
      InputError: no such preset, file, key or value.
    """
    path = FOLDER / f"{name}.yaml" if name in PRESETS else Path(name)
    if name not in PRESETS and not path.is_file():
        raise InputError(f"there is no preset {name!r:.80}: name one of {', '.join(PRESETS)}, or a YAML file")
    preset: Preset = config.load(Preset, path)
    _require(preset, path)
    for text in overrides:
        if (key := text.partition("=")[0].strip()) in OWN:
            raise InputError(f"{text}: a study sets {key} itself, for each of its runs: write a preset of your own")
    base = None if preset.config is None else find(preset.config)
    made = Study(path.stem, preset, output, overrides, data, base)
    try:
        _require_points(made)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return made


def _require_points(study: Study) -> None:
    """Make a run of each kind: a key or value that no run has is found here."""
    preset = study.preset
    for task in preset.tasks:
        for method in preset.methods:
            found = study.point(task, method, preset.learning_rates[0], preset.seeds[0]).config
            if not found.evaluate or found.epochs is not None:
                raise InputError("a study needs evaluate: true, and steps instead of epochs")
    first = (study.task, preset.method, preset.learning_rates[0], preset.seeds[0])
    if preset.shrink_ratios:
        study.point(*first, {RATIO: max(preset.shrink_ratios), STOP: False})
    for rank in preset.ranks:
        study.point(*first, {"lora.rank": rank, "lora.scaling": "rslora"})


def _require(preset: Preset, path: Path) -> None:
    """Check what the types do not say."""
    for key in ("tasks", "methods", "learning_rates", "rate_seeds", "seeds"):
        if not getattr(preset, key):
            raise InputError(f"{path}: {key} is empty: name at least one")
    for key in ("baseline", "method"):
        if getattr(preset, key) not in preset.methods:
            raise InputError(f"{path}: {key} {getattr(preset, key)!r} is none of methods: {', '.join(preset.methods)}")
    if preset.baseline == preset.method:
        raise InputError(f"{path}: baseline and method are both {preset.method!r}: name two of methods")
    for kind, names in (("tasks", preset.tasks), ("methods", preset.methods)):
        for name in names:
            if not NAME.fullmatch(name) or len(name) > LONGEST:
                text = f"use letters, digits and ._=,+-, at most {LONGEST} of them"
                raise InputError(f"{path}: {kind}.{name!r:.80} is no name of a directory: {text}")
    for method, keys in preset.methods.items():
        if "learning_rate" in keys.get("optimizer", {}):
            raise InputError(f"{path}: methods.{method}.optimizer.learning_rate: rates are those of learning_rates")
    for key in DISTINCT:
        if len(set(getattr(preset, key))) < len(getattr(preset, key)):
            raise InputError(f"{path}: {key} names a value twice")
    if any(low >= high for low, high in pairwise(preset.learning_rates)):
        raise InputError(f"{path}: learning_rates must ascend")
    if len(preset.learning_rates) < 2 and preset.widen:
        raise InputError(f"{path}: learning_rates needs two rates at least where widen is not 0")
    if not all(0 <= ratio < 1 for ratio in preset.shrink_ratios):
        raise InputError(f"{path}: shrink_ratios must be in [0, 1)")


def _get(nested: Keys, dotted: str) -> Any:
    for part in dotted.split("."):
        nested = nested.get(part, {}) if isinstance(nested, Mapping) else {}
    return nested
