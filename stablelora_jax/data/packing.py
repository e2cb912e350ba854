"""Packing of many texts a row by first-fit, with a segment for each text and positions that restart at 0.

The plan is made once, in the order of the data set: each text goes into the first row that still has room for it. It
depends on the lengths and the row length alone, not on seed, step or number of hosts, and is cached with the tokens.
An epoch shuffles rows, not texts: texts that share a row share it in every epoch. This changes no text's loss, since a
text attends to its own segment alone and the loss is a sum over tokens.

First-fit needs at most 1.7 times the rows of the best packing (Dosa and Sgall, STACS 2013). It wastes a few percent
where texts are short compared with the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stablelora_jax.data.batch import Batch, positions_of_mask
from stablelora_jax.data.encoding import Example, loss_mask
from stablelora_jax.utils.errors import InputError


class Plan(NamedTuple):
    """The texts of each row: row i holds ``texts[starts[i] : starts[i + 1]]``, in the order of the data set."""

    texts: np.ndarray  # (N,) int64
    starts: np.ndarray  # (rows + 1,) int64


def first_fit(lengths: Sequence[int] | np.ndarray, room: int) -> np.ndarray:
    """The row of each text, (N,) int32: the first row of ``room`` tokens that still has room for it.

    A tree of maxima over the room left in the rows finds it in log2(N) steps.

    Raises:
      InputError: a text is longer than a row.

    Example::

      >>> first_fit([5, 4, 3, 2], room=8).tolist()
      [0, 1, 0, 1]
    """
    needs = [int(n) for n in lengths]
    if needs and max(needs) > room:
        raise InputError(f"a text of {max(needs)} tokens does not fit into a row of {room}")
    leaves = 1 << max(0, len(needs) - 1).bit_length()
    left, rows = [room] * (2 * leaves), np.empty(len(needs), np.int32)
    for i, need in enumerate(needs):
        node = 1
        while node < leaves:
            node *= 2
            if left[node] < need:
                node += 1
        rows[i] = node - leaves
        left[node] -= need
        while node > 1:
            node //= 2
            most = max(left[2 * node], left[2 * node + 1])
            if left[node] == most:
                break
            left[node] = most
    return rows


def plan_of(row_of: np.ndarray) -> Plan:
    """The plan of the rows that :func:`first_fit` gives: the inverse map, from each row to its texts."""
    counts = np.bincount(row_of)
    return Plan(np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))


def pack(rows: Sequence[Sequence[Example]], length: int, max_loss_tokens: int | None = None) -> Batch:
    """One batch of ``(len(rows), length)``: the texts of each row one after another, segments 1, 2, ... and then pads.

    A text's first token is no loss token, since the token before it belongs to another text. ``max_loss_tokens`` is
    the K of ``loss_positions``; None: no ``loss_positions``.
    """
    batch = Batch(*(np.zeros((len(rows), length), np.int32) for _ in range(4)))
    for i, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, 1):
            end = start + len(example.tokens)
            batch.tokens[i, start:end], batch.segment_ids[i, start:end] = example.tokens, segment
            batch.positions[i, start:end] = np.arange(end - start)
            batch.loss_mask[i, start:end] = loss_mask(example)
            start = end
    if max_loss_tokens is None:
        return batch
    return batch._replace(loss_positions=positions_of_mask(batch.loss_mask, max_loss_tokens))
