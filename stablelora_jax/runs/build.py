"""The learning-rate schedule, the hyperparameters and the optimizer of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

from stablelora_jax.config import optimizer as optimizer_config
from stablelora_jax.config.members import arguments_of
from stablelora_jax.config.objective import arrays_of, takes_pairs
from stablelora_jax.config.rank_allocation import allocation_of
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import schedule_of
from stablelora_jax.lora.leaves import trains_pairs
from stablelora_jax.lora.transform import lora_hyperparams, lora_scales
from stablelora_jax.optimizers import scales
from stablelora_jax.optimizers.freeze import freeze, freeze_mask, stop_frozen_gradients
from stablelora_jax.rank_allocation import Allocation
from stablelora_jax.rank_allocation.restart import restartable
from stablelora_jax.training.objective import SFT, Objective, of_pairs
from stablelora_jax.training.step import Hyperparams
from stablelora_jax.utils.errors import InputError


def make_schedule(config: RunConfig, peak: float | None = None) -> optax.Schedule:
    """The schedule of the configuration: the learning rate by the number of updates so far.

    Args:
      config: its ``schedule`` and, where ``peak`` is None, the optimizer's ``learning_rate``.
      peak: the highest rate.

    Example::

      >>> from stablelora_jax.config.run import RunConfig
      >>> schedule = make_schedule(RunConfig(steps=10), peak=1.0)
      >>> float(schedule(9)) < float(schedule(5)) <= 1.0
      True
    """
    return schedule_of(config.schedule, config.optimizer.learning_rate if peak is None else peak, config.steps)


def make_hyperparams(config: RunConfig, adapters: Any) -> Hyperparams:
    """Learning rates, LoRA scales and dropout rates of the configuration, as arguments of the training step."""
    rates = optimizer_config.learning_rates(config.optimizer)
    return Hyperparams(
        {name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()}, lora_hyperparams(config.lora, adapters)
    )


def make_allocation(config: RunConfig) -> Allocation:
    """What the rank allocation of the configuration changes; nothing where it has none."""
    return allocation_of(config.rank_allocation, config.lora, config.optimizer, config.steps)


def make_optimizer(
    config: RunConfig, adapters: Any, hyperparams: Hyperparams | None = None, began: Any = 0
) -> optax.GradientTransformation:
    """Gradient clipping and the optimizer of the configuration, every learning rate on the schedule.

    Args:
      config: the run.
      adapters: or their shapes.
      hyperparams: learning rates and LoRA scales, concrete or traced; None: those of ``config``. A learning rate is a
        peak, or an array (steps,) with the rate of every update.
      began: updates before the first one that this optimizer counts, which the schedule has behind it.
    """
    rates = optimizer_config.learning_rates(config.optimizer) if hyperparams is None else hyperparams.rates
    numbers = {} if hyperparams is None else hyperparams.numbers
    scale = lambda: scales(adapters, config.lora) if hyperparams is None else lora_scales(hyperparams.lora_hyperparams)  # noqa: E731

    def schedule(peak: Any) -> optax.Schedule:
        whole = make_schedule(config, peak) if jnp.ndim(peak) == 0 else lambda count: peak[count]
        return whole if isinstance(began, int) and began == 0 else lambda count: whole(count + began)

    tx = optimizer_config.make_optimizer(config.optimizer, schedule, rates, scale, numbers)
    around = make_allocation(config).around
    tx = tx if around is None else around(tx)
    return tx if config.max_grad_norm is None else optax.chain(optax.clip_by_global_norm(config.max_grad_norm), tx)


def make_objective(config: RunConfig) -> Objective:
    """The objective of the configuration, as the training step takes it."""
    own = config.objective
    if not takes_pairs(own):
        return SFT
    function: Any = type(own).function
    return of_pairs(partial(function, **arguments_of(own)), arrays_of(function))


def make_training(
    config: RunConfig, params: Any, adapters: Any
) -> tuple[Callable[[Hyperparams], optax.GradientTransformation], Callable[[Any], Any]]:
    """``(tx, trained)`` for :func:`.make_train_step`, with ``config.freeze`` applied to both.

    ``tx`` makes the optimizer from the result of :func:`make_hyperparams`, one that can begin anew where the rank
    allocation restarts it; ``trained`` stops the gradients of frozen parts of the adapters. Shapes of ``params`` and
    ``adapters`` suffice.

    Raises:
      InputError: a pattern of ``config.freeze`` matches nothing, nothing is left to train, or the optimizer needs pairs
        where the parametrisation trains none.
    """
    own = config.optimizer
    if not trains_pairs(config.lora) and (own.name != "adamw" or optimizer_config.shrink_ratio(own)):
        raise InputError(
            f"optimizer {own.name} works on the two factors of a pair, and parametrization "
            f"{config.lora.parametrization!r} trains none: say optimizer: {{name: adamw}}"
        )
    trained = optimizer_config.trained_part(config.optimizer)
    mask = freeze_mask(params, adapters, config.lora, config.freeze) if config.freeze else None
    once = partial(_make, config, adapters, mask)
    restarts = make_allocation(config).restarts
    make = (lambda hyperparams: restartable(lambda began: once(hyperparams, began))) if restarts else once
    return make, trained if mask is None else lambda adapters: trained(stop_frozen_gradients(adapters, mask))


def _make(
    config: RunConfig, adapters: Any, mask: Any, hyperparams: Hyperparams, began: Any = 0
) -> optax.GradientTransformation:
    tx = make_optimizer(config, adapters, hyperparams, began)
    return tx if mask is None else freeze(tx, mask)
