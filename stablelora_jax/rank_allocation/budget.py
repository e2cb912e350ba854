"""A budget of ranks over all modules: how large it is after some updates, and which ranks it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.utils.tree import Path


def budget_schedule(first: int, last: int, steps: int, tinit: int, tfinal: int) -> Callable[[Any], jax.Array]:
    """b(t): the triplets that are kept after t updates, int32, from ``first`` to ``last``; t may be traced.

    A table of the steps at which it falls, computed in float64, so that it is the authors' to the last integer.
    """
    t = np.arange(tinit, steps - tfinal + 1)
    left = 1 - (t - tinit) / (steps - tfinal - tinit)
    values = ((first - last) * left**3 + last).astype(np.int64)  # towards zero, as Python's int
    falls = np.flatnonzero(np.diff(values, prepend=values[0] + 1))
    places, values = t[falls].astype(np.int32), values[falls].astype(np.int32)
    return lambda count: jnp.asarray(values)[jnp.maximum(jnp.searchsorted(places, count, side="right") - 1, 0)]


def largest(
    scores: Mapping[Path, jax.Array], used: Mapping[Path, np.ndarray], count: jax.Array
) -> dict[Path, jax.Array]:
    """Which of ``scores`` are among the ``count`` largest of all that are ``used``; of equal ones, the first.

    Args:
      scores: not negative, by path.
      used: bools of the same shapes.
      count: may be traced.
    """
    flat = jnp.concatenate([jnp.where(used[path], own, -1).ravel() for path, own in scores.items()])
    order = jnp.argsort(-flat, stable=True)
    kept = (jnp.zeros(flat.shape, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32)) < count) & (
        flat >= 0
    )
    ends = np.cumsum([own.size for own in scores.values()])[:-1]
    parts = zip(scores.items(), jnp.split(kept, ends), strict=True)
    return {path: part.reshape(own.shape) for (path, own), part in parts}
