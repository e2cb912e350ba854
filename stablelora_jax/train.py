"""One step of training, as a pure function over all local devices.

``params`` (the frozen base) is an argument, never part of the state; the state is donated; gradients are taken with
respect to the adapters alone, so the base gets neither gradients nor optimizer slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from stablelora_jax.data import Batch
from stablelora_jax.intercept import Adapted
from stablelora_jax.losses import masked_cross_entropy
from stablelora_jax.metrics import norm_summary
from stablelora_jax.optimize import latches
from stablelora_jax.parallel import AXIS
from stablelora_jax.stability import Stability, shrunk_adapters, stability
from stablelora_jax.tree import Path


class TrainState(NamedTuple):
    """All that training changes; enough to resume exactly."""

    step: jax.Array  # updates so far, int32 scalar
    adapters: Any
    opt_state: optax.OptState
    key: jax.Array  # raw PRNG key, uint32; never changes: randomness is folded from it by step and row


def init_state(adapters: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), adapters, tx.init(adapters), jax.random.key_data(key))


def make_train_step(
    model: Adapted, tx: optax.GradientTransformation, trained: Callable[[Any], Any] = lambda adapters: adapters
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]:
    """``(state, params, batch) -> (state, metrics)``, jit-compiled over all local devices by ``pmap``.

    ``state`` has one copy per device (``parallel.stack_copies``), ``params`` is replicated (``parallel.replicate``),
    ``batch`` is split (``parallel.split_rows``). Loss and gradients are means over the loss tokens of the whole batch,
    and dropout depends on the step and the row's number in it: the result does not depend on the number of devices.
    ``trained`` may hold parts of the adapters constant (``optimize.freeze_a``); their gradients are zero.
    """

    def loss_of(adapters: Any, params: Any, batch: Batch, rngs: Any, total: jax.Array) -> jax.Array:
        variables = {"params": params, "lora": trained(adapters)}
        logits = model.apply(variables, batch.tokens, batch.positions, batch.segment_ids, rngs=rngs)
        return masked_cross_entropy(logits, batch.tokens, batch.loss_mask)[0] / total

    def step(state: TrainState, params: Any, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        chex.assert_rank(batch, 2)
        chex.assert_equal_shape(batch)
        rngs = {"dropout": _row_keys(state, batch.tokens.shape[0])} if model.spec.dropout else None
        learnt = jax.lax.psum(batch.loss_mask[:, 1:].sum(), AXIS)
        loss, grads = jax.value_and_grad(loss_of)(state.adapters, params, batch, rngs, jnp.maximum(learnt, 1))
        loss, grads = jax.lax.psum((loss, grads), AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **norm_summary(adapters)}
        used = jax.lax.psum((batch.segment_ids > 0).sum(), AXIS)
        space = jax.lax.psum(batch.tokens.size, AXIS)
        metrics |= {"tokens": used, "loss_tokens": learnt, "padding": 1 - used / space, "latches": latches(opt_state)}
        return TrainState(state.step + 1, adapters, opt_state, state.key), metrics

    return jax.pmap(step, axis_name=AXIS, in_axes=(0, None, 0), donate_argnums=(0,))


def make_stability_view(
    model: Adapted, shrink_ratio: float | None
) -> Callable[[Any, Any, Any, Any, Batch], dict[Path, Stability]]:
    """``(before, after, latches, params, batch) -> terms``, jit-compiled over all local devices by ``pmap``.

    ``before`` and ``after`` are the adapters around the step, one copy per device (the step donates its state: copy
    the adapters before it), ``latches`` are the step's metric, ``shrink_ratio`` is lambda where the optimizer is
    Stable-LoRA and else None; ``params`` and ``batch`` are as in :func:`make_train_step`. Pads do not count, and z is
    as without dropout. Nothing is compiled until the first call.
    """

    def view(before: Any, after: Any, latches: Any, params: Any, batch: Batch) -> dict[Path, Stability]:
        shrunk = shrunk_adapters(before, latches, shrink_ratio)
        inputs = (batch.tokens, batch.positions, batch.segment_ids)
        variables = {"params": params, "lora": before}
        return stability(model, variables, shrunk, after, *inputs, token_mask=batch.segment_ids, axis_name=AXIS)

    return jax.pmap(view, axis_name=AXIS, in_axes=(0, 0, 0, None, 0))


def _row_keys(state: TrainState, rows: int) -> jax.Array:
    """One key for each row of this device, by the row's number in the whole batch."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    numbers = jax.lax.axis_index(AXIS) * rows + jnp.arange(rows)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
