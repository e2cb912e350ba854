"""From a configuration to the learning-rate schedule and the optimizer: look-ups and nothing else."""

from __future__ import annotations

from typing import Any

import optax

from stablelora_jax import optimizer_config
from stablelora_jax.run_config import RunConfig


def make_schedule(config: RunConfig, peak: float | None = None) -> optax.Schedule:
    """Learning rate by the number of updates so far: linear warm-up, then constant, or the named shape down to 0.

    Args:
      config: gives the shape and, where ``peak`` is not given, the optimizer's ``learning_rate``.
      peak: the highest rate.
    """
    peak = config.optimizer.learning_rate if peak is None else peak
    warmup = config.schedule.warmup_steps
    rest = max(1, config.steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule.name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def make_optimizer(config: RunConfig, adapters: Any) -> optax.GradientTransformation:
    """Clipping, then the optimizer of the configuration, all its learning rates on the schedule."""
    tx = optimizer_config.make_optimizer(
        config.optimizer, lambda peak: make_schedule(config, peak), adapters, config.lora
    )
    return tx if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
