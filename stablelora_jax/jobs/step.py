"""One compiled step of several jobs: the base's products run once over the rows of all of them.

A pass computes the losses and the gradients of its rows, by job. After the last pass of a round, the jobs whose batch
is complete are updated, each by its own optimizer from its own gradients, as
:func:`stablelora_jax.training.step.updated` would alone. All others keep their numbers to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from stablelora_jax.data import Batch
from stablelora_jax.jobs.kinds import Kind, Shapes, united
from stablelora_jax.lora.apply import Adapted
from stablelora_jax.parallel import Layout, Takes
from stablelora_jax.training.loss import weighted_losses
from stablelora_jax.training.step import Hyperparams, TrainState, updated

Metrics = dict[str, Any]


class Rows(NamedTuple):
    """Rows of a pass, each of one job."""

    batch: Batch
    slot: Int[np.ndarray, " B"]  # the job's slot, counted over all kinds
    number: Int[np.ndarray, " B"]  # the row's number in its job's batch, which its dropout depends on
    weight: Float[np.ndarray, " B"]  # 1 / the loss tokens of its job's whole batch; 0 in a row of pads


class Sums(NamedTuple):
    """What the passes of a round have given so far, by kind."""

    grads: tuple[Any, ...]  # of the adapters, (slots, ...)
    losses: tuple[jax.Array, ...]  # (slots,)


States = tuple[TrainState, ...]  # of all slots by kind, the slots as the first axis of every leaf


def init_states(starts: Sequence[TrainState], kinds: Sequence[Kind]) -> States:
    """Host arrays in which every slot of a kind holds the start of one of its jobs."""
    return tuple(
        jax.tree.map(lambda x, n=kind.slots: np.repeat(np.asarray(x)[None], n, axis=0), starts[kind.jobs[0]])
        for kind in kinds
    )


def make_jobs_step(
    model: Adapted, kinds: Sequence[Kind], shapes: Shapes, layout: Layout, *, dropout: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two functions, compiled for ``layout``: of the last pass of a round, and of those before it.

    ``last(states, sums, params, rows, hyperparams, ends) -> (states, metrics)`` and
    ``before(states, sums, params, rows, hyperparams) -> sums``. ``sums`` are None in the first pass. ``hyperparams``
    and ``ends`` (slots,) bool are by kind. Metrics, by kind with the slots in front, are those of
    :func:`stablelora_jax.training.step.updated`, and mean something where ``ends`` is true. ``states`` are donated to
    ``last``, ``sums`` to ``before``.

    Args:
      model: the decoder under a spec that covers all jobs (``covering_spec``).
      kinds: of the jobs.
      shapes: of the leaves of ``model``'s adapters, see :func:`.leaf_shapes`.
      layout: of states, ``params`` and rows.
      dropout: whether a job has any.
    """

    def summed(states: States, sums: Sums | None, params: Any, rows: Rows, hyperparams: Sequence[Hyperparams]) -> Sums:
        keys = _row_keys(states, rows) if dropout else None
        numbers = united([one.lora_hyperparams for one in hyperparams], _number_shapes(shapes))

        def loss_of(adapters: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
            seen = [jax.vmap(kind.trained)(own) for kind, own in zip(kinds, adapters, strict=True)]
            variables = {"params": params, "lora": united(seen, shapes), "lora_hp": numbers, "lora_rows": rows.slot}
            parts = layout.parts if layout.axis is None else 1
            return weighted_losses(model, variables, rows.batch, keys, rows.weight, parts=parts)

        (_, by_row), grads = jax.value_and_grad(loss_of, has_aux=True)(tuple(one.adapters for one in states))
        sizes = [kind.slots for kind in kinds]
        by_slot = jax.ops.segment_sum(by_row, rows.slot, sum(sizes))
        found: Sums = layout.sum_parts(Sums(grads, tuple(jnp.split(by_slot, np.cumsum(sizes)[:-1]))))
        return found if sums is None else jax.tree.map(jnp.add, sums, found)

    def last(
        states: States,
        sums: Sums | None,
        params: Any,
        rows: Rows,
        hyperparams: Sequence[Hyperparams],
        ends: Sequence[jax.Array],
    ) -> tuple[States, tuple[Metrics, ...]]:
        grads, losses = summed(states, sums, params, rows, hyperparams)
        found = []
        with jax.named_scope("update"):
            for kind, *own in zip(kinds, states, grads, losses, hyperparams, ends, strict=True):
                found.append(jax.vmap(partial(_slot, kind))(*own))
        return tuple(after for after, _ in found), tuple(metrics for _, metrics in found)

    takes: tuple[Takes, ...] = ("state", "state", "base", "rows", "base", "base")
    return layout.compile(last, takes, donate=(0,)), layout.compile(summed, takes[:5], donate=(1,))


def _slot(
    kind: Kind, state: TrainState, grads: Any, loss: jax.Array, hyperparams: Hyperparams, ends: jax.Array
) -> tuple[TrainState, Metrics]:
    after, metrics = updated(state, kind.make(hyperparams), loss, grads)
    return jax.tree.map(lambda new, old: jnp.where(ends, new, old), after, state), metrics


def _row_keys(states: Sequence[TrainState], rows: Rows) -> jax.Array:
    """The dropout key of each row: its job's, folded with the job's step and the row's number in the job's batch."""

    def of_step(key: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), step))

    data = jnp.concatenate([jax.vmap(of_step)(state.key, state.step) for state in states])
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(data[rows.slot]), rows.number)


def _number_shapes(shapes: Shapes) -> Shapes:
    """Of :func:`stablelora_jax.lora_hyperparams`, whose leaves have the shapes of the stacks."""
    names = ("lora_scale", "lora_dropout")
    return {path: dict.fromkeys(names, leaves["lora_a"][:-2]) for path, leaves in shapes.items()}
