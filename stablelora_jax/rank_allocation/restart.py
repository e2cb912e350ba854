"""An optimizer that can begin anew in the middle of a training, with its learning-rate schedule going on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RestartableState(NamedTuple):
    """State of :func:`restartable`."""

    count: jax.Array  # type: ignore[assignment]  # updates so far, int32
    began: jax.Array  # of them, those before the last restart, int32
    inner: optax.OptState  # since the last restart


def restartable(
    make: Callable[[jax.Array], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """``make(began)``, whose state :func:`restart` makes anew.

    Args:
      make: gives the optimizer whose schedules are at ``count + began`` where the optimizer counts ``count`` updates.

    Example::

      >>> schedule = optax.linear_schedule(1.0, 0.0, 10)
      >>> tx = restartable(lambda began: optax.adam(lambda count: schedule(count + began)))
      >>> state = tx.init(jnp.ones(3))
      >>> state = tx.update(jnp.ones(3), state)[1]
      >>> state = restart(tx, state, jnp.ones(3))  # moments are zero, the schedule is at its second step
      >>> round(float(tx.update(jnp.ones(3), state)[0][0]), 3)
      -0.9
    """

    def init(params: Any) -> RestartableState:
        zero = jnp.zeros((), jnp.int32)
        return RestartableState(zero, zero, make(zero).init(params))

    def update(updates: Any, state: RestartableState, params: Any = None, **extra: Any) -> tuple[Any, RestartableState]:
        tx = optax.with_extra_args_support(make(state.began))
        updates, inner = tx.update(updates, state.inner, params, **extra)
        return updates, state._replace(count=optax.safe_increment(state.count), inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def restart(tx: optax.GradientTransformation, state: RestartableState, params: Any) -> RestartableState:
    """The state of ``tx``, which :func:`restartable` has made, as at its first update, but for the schedule."""
    new: Any = tx.init(params)
    return RestartableState(state.count, state.count, new.inner)
