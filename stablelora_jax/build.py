"""From a configuration to the learning-rate schedule, the optimizer and what it trains: look-ups and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from stablelora_jax import optimizer_config
from stablelora_jax.freeze import freeze, frozen, hold
from stablelora_jax.run_config import RunConfig
from stablelora_jax.schedule_config import schedule_of


def make_schedule(config: RunConfig, peak: float | None = None) -> optax.Schedule:
    """Learning rate by the number of updates so far: the schedule of the configuration.

    Args:
      config: gives the shape and, where ``peak`` is not given, the optimizer's ``learning_rate``.
      peak: the highest rate.
    """
    return schedule_of(config.schedule, config.optimizer.learning_rate if peak is None else peak, config.steps)


def make_optimizer(config: RunConfig, adapters: Any) -> optax.GradientTransformation:
    """Clipping, then the optimizer of the configuration, all its learning rates on the schedule."""
    tx = optimizer_config.make_optimizer(
        config.optimizer, lambda peak: make_schedule(config, peak), adapters, config.lora
    )
    return tx if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)


def make_training(
    config: RunConfig, params: Any, adapters: Any
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """``(tx, trained)``: the optimizer around which ``config.freeze`` lies, and the adapters as the loss sees them.

    Shapes of ``params`` and ``adapters`` are enough.

    Raises:
      InputError: a pattern of ``config.freeze`` that matches nothing, or all of them leave nothing to train.
    """
    tx, trained = make_optimizer(config, adapters), optimizer_config.trained_part(config.optimizer)
    if not config.freeze:
        return tx, trained
    mask = frozen(params, adapters, config.lora, config.freeze)
    return freeze(tx, mask), lambda adapters: trained(hold(adapters, mask))
