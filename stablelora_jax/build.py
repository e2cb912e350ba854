"""From a configuration to the learning-rate schedule and the optimizer: look-ups and nothing else."""

from __future__ import annotations

import optax

from stablelora_jax.optimize import stable_lora
from stablelora_jax.run_config import RunConfig


def make_schedule(config: RunConfig) -> optax.Schedule:
    """Learning rate by the number of updates so far: linear warm-up, then constant, or the named shape down to 0."""
    peak, warmup = config.optimizer.learning_rate, config.schedule.warmup_steps
    rest = max(1, config.steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule.name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def make_optimizer(config: RunConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then Stable-LoRA around AdamW."""
    o = config.optimizer
    stable = stable_lora(schedule, o.shrink_ratio, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return stable if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), stable)
