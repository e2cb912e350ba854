"""From a configuration to the learning-rate schedule, the optimizer and what it trains: look-ups and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

from stablelora_jax.config import optimizer as optimizer_config
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import schedule_of
from stablelora_jax.lora.transform import lora_hyperparams, lora_scales
from stablelora_jax.optimizers import scales
from stablelora_jax.optimizers.freeze import freeze, freeze_mask, stop_frozen_gradients
from stablelora_jax.training.step import Hyperparams


def make_schedule(config: RunConfig, peak: float | None = None) -> optax.Schedule:
    """Learning rate by the number of updates so far: the schedule of the configuration.

    Args:
      config: gives the shape and, where ``peak`` is not given, the optimizer's ``learning_rate``.
      peak: the highest rate.
    """
    return schedule_of(config.schedule, config.optimizer.learning_rate if peak is None else peak, config.steps)


def numbers_of(config: RunConfig, adapters: Any) -> Hyperparams:
    """The numbers of the configuration that a sweep varies: they are arguments of the step."""
    rates = optimizer_config.learning_rates(config.optimizer)
    return Hyperparams(
        {name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()}, lora_hyperparams(config.lora, adapters)
    )


def make_optimizer(
    config: RunConfig, adapters: Any, numbers: Hyperparams | None = None
) -> optax.GradientTransformation:
    """Clipping, then the optimizer of the configuration, all its learning rates on the schedule.

    With ``numbers`` learning rates and LoRA scales are theirs, concrete or traced.
    """
    rates = optimizer_config.learning_rates(config.optimizer) if numbers is None else numbers.rates
    scale = lambda: scales(adapters, config.lora) if numbers is None else lora_scales(numbers.lora_hyperparams)  # noqa: E731
    tx = optimizer_config.make_optimizer(config.optimizer, lambda peak: make_schedule(config, peak), rates, scale)
    return tx if config.max_grad_norm is None else optax.chain(optax.clip_by_global_norm(config.max_grad_norm), tx)


def make_training(
    config: RunConfig, params: Any, adapters: Any
) -> tuple[Callable[[Hyperparams], optax.GradientTransformation], Callable[[Any], Any]]:
    """``(tx, trained)``: the optimizer around which ``config.freeze`` lies, and the adapters as the loss sees them.

    Shapes of ``params`` and ``adapters`` are enough. ``tx`` takes what :func:`numbers_of` gives.

    Raises:
      InputError: a pattern of ``config.freeze`` that matches nothing, or all of them leave nothing to train.
    """
    trained = optimizer_config.trained_part(config.optimizer)
    make = partial(make_optimizer, config, adapters)
    if not config.freeze:
        return make, trained
    mask = freeze_mask(params, adapters, config.lora, config.freeze)
    return lambda numbers: freeze(make(numbers), mask), lambda adapters: trained(stop_frozen_gradients(adapters, mask))
