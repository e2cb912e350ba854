"""Which rows a step takes: one endless sequence of shuffled epochs, cut into steps, and each step into parts.

The order is a pure function of (seed, step). So the state of the iterator is one integer that the training state holds
anyhow: (epoch, row) is ``divmod(step * batch_size, rows)``. It is restored exactly, at any step, on any number of
hosts, since every host computes the same global order and takes a slice of each step's rows.

This is why there is no grain here, the JAX ecosystem's loader. Grain gives deterministic shuffling, worker processes
that read and transform, and a state for each host's iterator. The tokens here come from memory-mapped arrays, where a
batch costs about a millisecond, so workers would have nothing to do; and a state for each host is tied to the number of
hosts that wrote it, while this one is not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where a step begins in the one global order."""

    epoch: int
    row: int  # of that epoch's shuffled rows, those before it are done


def place_of_step(step: int, batch_size: int, count: int) -> Place:
    """Where step ``step`` (from 0) begins, among epochs of ``count`` rows."""
    return Place(*divmod(step * batch_size, count))


def rows_of_step(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """The ``batch_size`` rows of step ``step`` (from 0): slices of one endless sequence of shuffled epochs.

    A function of its arguments alone, so a run that is resumed at a step goes on with the very rows it would have had.
    """
    places = (divmod(place, count) for place in range(step * batch_size, (step + 1) * batch_size))
    return [int(_epoch(epoch, count, seed)[row]) for epoch, row in places]


@lru_cache(maxsize=2)
def _epoch(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
