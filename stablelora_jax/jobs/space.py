"""The space of a search: the range or the choices of each key, and what Optuna's sampler draws from it.

::

    search: {trials: 30, seed: 0, seeds: [0, 1]}
    space:
      optimizer.learning_rate: {low: 1e-5, high: 1e-2, log: true}
      lora.rank: {low: 4, high: 32, step: 4}
      optimizer: {choices: [adamw, {name: stable_lora, shrink_ratio: 1e-3}]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stablelora_jax import config
from stablelora_jax.config import Section, option
from stablelora_jax.config.keys import NonNegativeInt, PositiveInt
from stablelora_jax.jobs.file import as_overrides
from stablelora_jax.utils.errors import InputError

Drawn = dict[str, int | float]  # of one trial, by key: a number, or the index of a choice or of a step


@dataclass(frozen=True)
class Search(Section):
    """A search by Optuna's TPE sampler.

    Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization, section 4.
    """

    trials: PositiveInt = option(30, "number of trials")
    seed: NonNegativeInt = option(0, "of the sampler")
    startup: PositiveInt = option(
        10, "number of results from which on the sampler uses them; before, it draws at random"
    )
    seeds: tuple[NonNegativeInt, ...] = option((), "seeds of each trial, whose mean counts; none: the one of common")


@dataclass(frozen=True)
class Axis(Section):
    """What a key of the space may be: integers where ``low``, ``high`` and ``step`` are, else floats; or choices."""

    low: int | float | None = option(None, "smallest value")
    high: int | float | None = option(None, "largest value")
    step: int | float | None = option(None, "values are low, low + step, ...")
    log: bool = option(False, "draw the logarithm uniformly")
    choices: tuple[Any, ...] = option((), "values, instead of low and high")


def axes_of(space: Mapping[str, Mapping[str, Any]]) -> dict[str, Axis]:
    """The axes by key, checked.

    Raises:
      InputError: naming the key.
    """
    found = {}
    for key, own in space.items():
        try:
            found[key] = config.load(Axis, None, as_overrides(own))
        except InputError as error:
            raise InputError(f"space.{key}: {error}") from None
        if problem := _problem(found[key]):
            raise InputError(f"space.{key}: {problem}")
    return found


def _problem(axis: Axis) -> str | None:
    """Why nothing can be drawn from the axis."""
    low, high = axis.low, axis.high
    if axis.choices:
        given = low is not None or high is not None or axis.step is not None or axis.log
        return "choices stand alone: leave low, high, step and log out" if given else None
    if low is None or high is None:
        return "name low and high, or choices"
    if low >= high:
        return f"low must be below high, not {low} and {high}"
    if axis.log and (low <= 0 or axis.step is not None):
        return "with log, low must be above 0, and there is no step"
    return None if axis.step is None or axis.step > 0 else f"step must be above 0, not {axis.step}"


def values_of(axes: Mapping[str, Axis], drawn: Mapping[str, int | float]) -> dict[str, Any]:
    """The values of a trial by key."""
    return {key: _value(axis, drawn[key]) for key, axis in axes.items()}


def _value(axis: Axis, drawn: int | float) -> Any:
    if axis.choices:
        return axis.choices[int(drawn)]
    if axis.step is None or axis.low is None:
        return drawn
    value = axis.low + int(drawn) * axis.step
    return value if isinstance(value, int) else float(f"{value:.12g}")  # 0.9, not 0.8999999999999999


def corners(axes: Mapping[str, Axis]) -> list[Drawn]:
    """Two trials, at the lower and the upper ends, and one for each further choice."""
    low = {key: _ends(axis)[0] for key, axis in axes.items()}
    high = {key: 0 if axis.choices else _ends(axis)[1] for key, axis in axes.items()}
    return [low, high, *({**low, key: i} for key, axis in axes.items() for i in range(1, len(axis.choices)))]


def _ends(axis: Axis) -> tuple[int | float, int | float]:
    """The least and the greatest number that is drawn."""
    if axis.choices:
        return 0, len(axis.choices) - 1
    assert axis.low is not None and axis.high is not None
    if axis.step is None:
        return axis.low, axis.high
    return 0, math.floor((axis.high - axis.low) / axis.step + 1e-9)


def require_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
      InputError: it is not.
    """
    try:
        from optuna import create_study  # noqa: F401  # a mere folder called optuna can be imported, too
    except ImportError:
        raise InputError('search: it needs Optuna: pip install "stablelora-jax[optuna]"') from None


def ask(
    axes: Mapping[str, Axis], search: Search, told: Sequence[tuple[Drawn, float]], count: int, minimize: bool
) -> list[Drawn]:
    """The next ``count`` trials, a function of the arguments alone.

    Trials that have been asked but have no result count as bad ones (``constant_liar``), so that they differ. Failed
    ones are told as pruned, the worst results: Optuna forgets those in its state FAIL, and draws there again and again.

    Args:
      axes: the space.
      search: ``seed`` and ``startup``.
      told: the trials so far with their values; one that is not finite has failed.
      count: number of trials.
      minimize: whether low values are good.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = int(np.random.SeedSequence([search.seed, len(told)]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize" if minimize else "maximize")
    space = {key: _distribution(axis) for key, axis in axes.items()}
    for drawn, value in told:
        result = {"value": value} if math.isfinite(value) else {"state": optuna.trial.TrialState.PRUNED}
        study.add_trial(optuna.create_trial(params=drawn, distributions=space, **result))
    return [dict(study.ask(space).params) for _ in range(count)]


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    low, high = _ends(axis)
    if axis.choices:
        return CategoricalDistribution(list(range(len(axis.choices))))
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=axis.log)
    return FloatDistribution(low, high, log=axis.log)
