"""Adam of optax that never mistakes an overflow for a step of zero.

The second moment holds squares: those of gradients beyond the root of the largest number, 1.8e19 in float32, are
infinite, and Adam would then divide by infinity, now and for ever after. Such a gradient gives NaN here, so that a
check for finite updates skips the step; every other number keeps its bits, and the state is that of optax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

SQUARED = 63 / 64  # of the root of the largest number: room for what rounding adds to the bias-corrected moment


def adamw(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformationExtraArgs:
    """``optax.adamw``."""
    return _seeing_overflow(optax.adamw(learning_rate, **options))


def scale_by_adam(**options: Any) -> optax.GradientTransformationExtraArgs:
    """``optax.scale_by_adam``."""
    return _seeing_overflow(optax.scale_by_adam(**options))


def _seeing_overflow(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(adam)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        steps, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(_or_nan, steps, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _or_nan(step: Any, gradient: Any) -> Any:
    """``step``, with NaN where the square of ``gradient`` is not finite."""
    dtype = jnp.result_type(gradient)
    if not jnp.issubdtype(dtype, jnp.floating):
        return step
    return jnp.where(jnp.abs(gradient) <= SQUARED * float(jnp.finfo(dtype).max) ** 0.5, step, jnp.nan)
