"""Jobs by kind: those whose adapters and optimizer have one structure are updated by one program.

Jobs of one kind differ in numbers alone, which are arguments of the step: learning rates with their schedule and
length, scale, dropout rate, shrink ratio, seed. Each kind has a few *slots*, the first axis of its arrays. A job takes
a slot when it begins, and leaves it to another job of its kind without a new compilation. All kinds share the forward
pass: there, their adapters are padded with zeros to one rank and to the target modules of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax.config import to_dict
from stablelora_jax.config.optimizer import learning_rates
from stablelora_jax.config.schedule import schedule_of
from stablelora_jax.lora.pairs import FULL, pair_shapes, pairs
from stablelora_jax.lora.to_lora import is_plain
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.parallel import to_host
from stablelora_jax.runs.prepare import TrainingSetup
from stablelora_jax.training.step import Hyperparams
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path, keys_of

NUMBERS = ("shrink_ratio",)  # arguments of an optimizer that may be traced
SAME = ("model", "parallel", "distributed")  # keys that all jobs side by side share
SAME_LORA = ("parametrization", "stacked", "in_axes")
Shapes = Mapping[Path, Mapping[str, tuple[int, ...]]]  # of the leaves of one adapter, by module


class Kind(NamedTuple):
    """What the jobs of a kind have in common."""

    jobs: tuple[int, ...]  # their numbers
    slots: int
    make: Callable[[Hyperparams], optax.GradientTransformation]
    trained: Callable[[Any], Any]  # stops the gradients of frozen parts of the adapters


def kinds_of(setups: Sequence[TrainingSetup], at_once: int) -> list[Kind]:
    """The jobs by kind, with as many slots as jobs of it can be trained at once."""
    found: dict[str, list[int]] = {}
    for number, setup in enumerate(setups):
        found.setdefault(_structure(setup), []).append(number)
    return [
        Kind(tuple(jobs), min(at_once, len(jobs)), setups[jobs[0]].tx, setups[jobs[0]].trained)
        for jobs in found.values()
    ]


def _structure(setup: TrainingSetup) -> str:
    """What decides the program of a job's update, as text."""
    config = setup.config
    spec = replace(config.lora, alpha=config.lora.rank, scaling="lora", alpha_pattern={}, dropout=0.0)
    rates = sorted(learning_rates(config.optimizer))
    optimizer = {name: own for name, own in to_dict(config.optimizer).items() if name not in (*rates, *NUMBERS)}
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), setup.start)
    return repr((optimizer, rates, config.max_grad_norm, config.freeze, spec, shapes))


def numbers_of(setup: TrainingSetup, steps: int) -> Hyperparams:
    """The numbers of a job as host arrays: the learning rate of each of ``steps`` updates, scales, dropout rates."""
    config = setup.config
    at = jnp.arange(steps)
    tables = {}
    for name, rate in learning_rates(config.optimizer).items():
        schedule: Any = schedule_of(config.schedule, jnp.asarray(rate, jnp.float32), config.steps)
        tables[name] = np.asarray(jax.vmap(schedule)(at), np.float32)
    given = {name: getattr(config.optimizer, name) for name in NUMBERS if hasattr(config.optimizer, name)}
    require_numbers(**given)
    numbers = {name: np.asarray(value, jnp.result_type(float)) for name, value in given.items()}
    return Hyperparams(tables, to_host(setup.hyperparams.lora_hyperparams), numbers)


def require_together(names: Sequence[str], setups: Sequence[TrainingSetup]) -> None:
    """Check that jobs can be trained side by side.

    Raises:
      InputError: naming the job and the key that stands against it.
    """
    first = setups[0].config
    for name, setup in zip(names, setups, strict=True):
        own = setup.config
        for key in SAME:
            if to_dict(getattr(own, key)) != to_dict(getattr(first, key)):
                raise InputError(f"jobs.{name}: {key} must be the same for all jobs: train it alone")
        for key in SAME_LORA:
            if getattr(own.lora, key) != getattr(first.lora, key):
                raise InputError(f"jobs.{name}: lora.{key} must be the same for all jobs: train it alone")
        if own.objective.name != "sft":
            raise InputError(f"jobs.{name}: objective {own.objective.name} is for a run alone")
        if own.rank_allocation is not None:
            raise InputError(f"jobs.{name}: rank_allocation is for a run alone")
        if own.stability_every is not None:
            raise InputError(f"jobs.{name}: stability_every is for a run alone")
        if any(FULL in keys_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(setup.start.adapters)):
            raise InputError(f"jobs.{name}: lora.modules_to_save and lora.bias are for a run alone")
        if not is_plain(setup.start.adapters, own.lora):
            words = f"{own.lora.parametrization}, init {own.lora.init} and scaling {own.lora.scaling}"
            raise InputError(f"jobs.{name}: lora with {words} is for a run alone")
        if own.lora.parametrization != "lora" and set(pairs(setup.start.adapters)) != set(
            pairs(setups[0].start.adapters)
        ):
            raise InputError(f"jobs.{name}: with {own.lora.parametrization}, all jobs have the same target_modules")


def leaf_shapes(trees: Sequence[Any]) -> Shapes:
    """Of each module, the shapes that hold the leaves of any of ``trees``, the adapters of single jobs."""
    found: dict[Path, dict[str, tuple[int, ...]]] = {}
    for adapters in trees:
        pair_shapes(adapters)
        for path, pair in pairs(adapters).items():
            known = found.setdefault(path, {})
            for name, leaf in pair.items():
                shape = np.shape(leaf)
                known[name] = tuple(map(max, known.get(name, shape), shape))
    return found


def united(trees: Sequence[Any], shapes: Shapes) -> Any:
    """The adapters of all kinds, each with its slots in front, as one tree: (slots of all, ...) of ``shapes``."""
    whole: dict[str, Any] = {}
    for path, leaves in shapes.items():
        for name, shape in leaves.items():
            parts = [_padded(tree.get_in(one, (*path, name)), one, shape) for one in trees]
            whole = tree.set_in(whole, (*path, name), jnp.concatenate(parts))
    return whole


def _padded(leaf: Any, own: Any, shape: tuple[int, ...]) -> jax.Array:
    """``leaf`` (slots, ...) with zeros up to ``shape``; where ``own`` does not have it, zeros alone."""
    if leaf is None:
        some = jax.tree.leaves(own)[0]
        return jnp.zeros((some.shape[0], *shape), some.dtype)
    return jnp.pad(leaf, [(0, 0), *((0, n - m) for n, m in zip(shape, leaf.shape[1:], strict=True))])
