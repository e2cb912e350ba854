"""One step of training, as a pure function over all devices.

``params`` (the frozen base) is an argument, never part of the state; the state is donated; gradients are taken with
respect to the adapters alone, so the base gets neither gradients nor optimizer slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.data import Batch
from stablelora_jax.lora.apply import Adapted
from stablelora_jax.lora.leaves import split_frozen, with_frozen
from stablelora_jax.models.decoder import head_path
from stablelora_jax.optimizers import latches
from stablelora_jax.parallel import Layout, Takes, rows_here
from stablelora_jax.training.loss import target_positions
from stablelora_jax.training.metrics import norm_summary, stop_ratios
from stablelora_jax.training.objective import SFT, Objective
from stablelora_jax.training.stability import Stability, shrunk_adapters, stability
from stablelora_jax.utils.tree import Path, get_in

T = TypeVar("T")


class TrainState(NamedTuple):
    """The state that training changes; enough to resume exactly."""

    step: jax.Array  # steps so far, int32 scalar
    skipped: jax.Array  # steps that changed nothing, since a value in them was not finite, int32 scalar
    consecutive_skips: jax.Array  # number of skipped steps up to the last one, int32 scalar
    adapters: Any
    opt_state: optax.OptState
    key: jax.Array  # raw PRNG key, uint32; constant: keys are folded from it by step and row


class Hyperparams(NamedTuple):
    """Hyperparameters as arrays: another value needs no new compilation."""

    rates: Mapping[str, Any]  # the optimizer's learning rates at their peak, scalars, by name
    lora_hyperparams: Any  # scales and dropout rates, as ``lora_hyperparams`` makes them; None: those of the spec
    numbers: Mapping[str, Any] = {}  # further arguments of the optimizer, scalars, by name


MakeOptimizer = Callable[[Hyperparams], optax.GradientTransformation]


def init_state(adapters: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, adapters, tx.init(split_frozen(adapters)[0]), jax.random.key_data(key))


def make_train_step(
    model: Adapted,
    tx: optax.GradientTransformation | MakeOptimizer,
    layout: Layout,
    *,
    trained: Callable[[Any], Any] = lambda adapters: adapters,
    seen: Callable[[Any, jax.Array], Any] | None = None,
    penalty: Callable[[Any], jax.Array] | None = None,
    accumulate: int = 1,
    objective: Objective = SFT,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """``(state, params, batch) -> (state, metrics)``, compiled for ``layout``.

    Loss and gradients are sums over the loss tokens of the whole batch, divided by their number in it, and dropout
    depends on the step and the row's number in the batch. The result therefore depends, up to rounding, neither on the
    devices nor on ``accumulate``. A step whose loss, gradient or update is not finite changes only the counts.

    Args:
      model: the adapted decoder.
      tx: sees the gradients of the adapters. Or a function that makes it from :class:`Hyperparams`: then the step takes
        them as its fourth argument, placed like ``params``, and compiles once for all of them.
      layout: of state, ``params`` and the rows of ``batch``.
      trained: may stop the gradients of parts of the adapters (``optimizers.freeze_a``).
      seen: gives the adapters, frozen leaves included, as the model sees them in a step, by the step's key.
      penalty: of the trained leaves, whose gradient is added to that of the loss; metrics report the loss without it.
      accumulate: the number of micro-batches of a batch, computed one after another.
      objective: what is minimised. The rows of one device and micro-batch are a multiple of its ``group``.
    """

    def step(
        state: TrainState, params: Any, batch: Batch, hyperparams: Hyperparams | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        rows = rows_here(batch.tokens.shape[0], layout.axis)
        parts = layout.parts if layout.axis is None else 1
        loss_tokens = layout.sum_parts(target_positions(batch)[1].sum())
        count = loss_tokens if objective is SFT else layout.sum_parts(objective.divisor(batch))
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        own, frozen = split_frozen(state.adapters)

        def loss_of(adapters: Any, micro: Batch, rows: jax.Array) -> jax.Array:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows) if model.spec.dropout else None
            lora = with_frozen(trained(adapters), frozen)
            variables = {"params": params, "lora": lora if seen is None else seen(lora, key)}
            if hyperparams is not None and hyperparams.lora_hyperparams is not None:
                variables["lora_hp"] = hyperparams.lora_hyperparams
            return objective.loss(model, variables, micro, keys, parts) / jnp.maximum(count, 1)

        micros = jax.tree.map(lambda x: micro_batches(x, parts, accumulate), (batch, rows))
        loss, grads = layout.sum_parts(summed_over(partial(jax.value_and_grad(loss_of), own), micros))
        if penalty is not None:
            more = jax.grad(lambda adapters: penalty(trained(adapters)))(own)
            grads = jax.tree.map(jnp.add, grads, more)
        with jax.named_scope("update"):  # in the names of operations, for a profile
            after, metrics = updated(state, made(hyperparams), loss, grads)
        used, space = (layout.sum_parts(jnp.asarray(x)) for x in ((batch.segment_ids > 0).sum(), batch.tokens.size))
        return after, metrics | {"tokens": used, "loss_tokens": loss_tokens, "padding": 1 - used / space}

    fixed = isinstance(tx, optax.GradientTransformation)
    made: Any = (lambda hyperparams: tx) if fixed else tx
    takes: tuple[Takes, ...] = ("state", "base", "rows", "base")
    return layout.compile(step, takes[:3] if fixed else takes, donate=(0,))


def make_stability_view(
    model: Adapted, shrink_ratio: float | None, layout: Layout
) -> Callable[[Any, Any, Any, Any, Batch], dict[Path, Stability]]:
    """``(before, after, latches, params, batch) -> terms``, compiled for ``layout``.

    ``before`` and ``after`` are the adapters around the step (the step donates its state: copy the adapters before
    it), ``latches`` are the step's metric, ``shrink_ratio`` is lambda where the optimizer is Stable-LoRA and else None;
    ``params`` and ``batch`` are as in :func:`make_train_step`. Pads do not count, and z is as without dropout. Nothing
    is compiled until the first call.
    """

    def view(before: Any, after: Any, latches: Any, params: Any, batch: Batch) -> dict[Path, Stability]:
        shrunk = shrunk_adapters(before, latches, shrink_ratio)
        inputs = (batch.tokens, batch.positions, batch.segment_ids)
        variables = {"params": params, "lora": before}
        method = None if get_in(before, head_path(model.model.config)) else "hidden"  # logits for an adapted head alone
        how: dict[str, Any] = {"token_mask": batch.segment_ids, "axis_name": layout.axis, "method": method}
        return stability(model, variables, shrunk, after, *inputs, **how)

    return layout.compile(view, ("state", "state", "state", "base", "rows"))


def micro_batches(x: jax.Array, parts: int, count: int) -> jax.Array:
    """(B, ...) -> (count, B / count, ...), every micro-batch with as many rows of each part."""
    own = x.shape[0] // (parts * count)
    return x.reshape(parts, count, own, *x.shape[1:]).swapaxes(0, 1).reshape(count, parts * own, *x.shape[1:])


def summed_over(function: Callable[..., T], micros: Any) -> T:
    """The sum of ``function(*micro)``, a tree, over micro-batches that are computed one after another."""
    first = jax.tree.map(lambda x: x[0], micros)
    if len(jax.tree.leaves(micros)[0]) == 1:
        return function(*first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))

    def add(summed: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, summed, function(*micro)), None

    found: T = jax.lax.scan(add, zeros, micros)[0]
    return found


def updated(
    state: TrainState, tx: optax.GradientTransformation, loss: jax.Array, grads: Any
) -> tuple[TrainState, dict[str, Any]]:
    """The state after the update, or where anything is not finite the old one with its counts; and the metrics."""
    norm = optax.tree.norm(grads)
    own, frozen = split_frozen(state.adapters)
    updates, opt_state = tx.update(grads, state.opt_state, own)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    new = (optax.apply_updates(own, updates), opt_state)
    own, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (own, state.opt_state))
    adapters = with_frozen(own, frozen)
    bad = (~finite).astype(jnp.int32)
    consecutive_skips = jnp.where(finite, 0, state.consecutive_skips + 1)
    after = TrainState(state.step + 1, state.skipped + bad, consecutive_skips, adapters, opt_state, state.key)
    metrics = {"loss": loss, "gradient_norm": norm, "applied": state.step - state.skipped, "skipped": bad}
    return after, {
        **metrics,
        "consecutive_skips": consecutive_skips,
        **norm_summary(adapters),
        "stop_ratios": stop_ratios(adapters),
        "latches": latches(opt_state),
    }
