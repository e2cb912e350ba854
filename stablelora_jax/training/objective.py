"""What a training step minimises: a sum over the rows of a batch, divided by a count over the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stablelora_jax.data import Batch
from stablelora_jax.lora.apply import Adapted
from stablelora_jax.training.loss import completion_log_probs, summed_loss, target_positions


class Objective(NamedTuple):
    """A loss that adds up over rows, or over groups of rows that follow one another."""

    loss: Callable[[Adapted, Mapping[str, Any], Batch, Any, int], jax.Array]  # of model, variables, batch, keys, parts
    divisor: Callable[[Batch], jax.Array]  # the number of what the loss is a mean of
    group: int  # rows that belong together


def _loss_tokens(batch: Batch) -> jax.Array:
    return target_positions(batch)[1].sum()


SFT = Objective(
    lambda model, variables, batch, keys, parts: summed_loss(model, variables, batch, keys, parts=parts),
    _loss_tokens,
    group=1,
)


def of_pairs(function: Callable[..., jax.Array], arrays: Sequence[str]) -> Objective:
    """The objective over rows of which each even one is preferred to the next: a mean over pairs.

    Args:
      function: of :mod:`stablelora_jax.objectives`: gives the loss of each pair.
      arrays: the arguments that it takes of ``chosen``, ``rejected``, the same with ``ref_`` before them, which are of
        the base, the adapters left out, and with ``_length`` after them. No second copy of the base is held.
    """

    def loss(model: Adapted, variables: Mapping[str, Any], batch: Batch, keys: Any, parts: int) -> jax.Array:
        given = _sides("", completion_log_probs(model, variables, batch, keys, parts=parts))
        if "ref_chosen" in arrays:
            base = completion_log_probs(model, {"params": variables["params"]}, batch, parts=parts)
            given |= _sides("ref_", jax.lax.stop_gradient(base))
        lengths = _lengths(batch)
        given |= {f"{side}_length": n for side, n in _sides("", lengths).items()}
        there = lengths[::2] > 0  # an absent pair is given numbers whose gradients are finite
        losses = function(**{name: jnp.where(there, given[name], 1 if "_length" in name else -1) for name in arrays})
        return jnp.where(there, losses, 0).sum()

    return Objective(loss, lambda batch: (_lengths(batch)[::2] > 0).sum(), group=2)


def _lengths(batch: Batch) -> jax.Array:
    """Loss tokens of each row."""
    return target_positions(batch)[1].sum(axis=1)


def _sides(prefix: str, rows: jax.Array) -> dict[str, jax.Array]:
    return {f"{prefix}chosen": rows[::2], f"{prefix}rejected": rows[1::2]}
