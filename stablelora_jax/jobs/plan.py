"""Rounds: in each, every active job reads one batch and makes one step; its rows are spread over a few passes.

A pass has room for so many tokens: rows of T tokens, as many as fit. All rows of the round are sorted by length, the
longest first, and fill pass after pass, whose T is that of its longest row (LoRAFusion, arXiv 2510.00206, packs bins by
first-fit decreasing, too). So few pads are multiplied, every T is compiled once, and
the devices of a pass have the same work. A round depends on the jobs and their steps alone: it is the same on resuming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from stablelora_jax.data import Batch, Loader, batch_of_step, bucket
from stablelora_jax.jobs.step import Rows

CANDIDATES = (1, 2, 3, 4, 6, 8)  # passes of a round that are tried
OVERHEAD = 128  # tokens: what a pass costs beside its tokens
ROUNDS = 8  # that are tried


class Pass(NamedTuple):
    """Rows that are computed together, ``(job, number of the row in the job's batch)``."""

    length: int
    rows: tuple[tuple[int, int], ...]


def row_lengths(batch: Batch) -> list[int]:
    """The padded length of each row: the bucket of its last token, at most the length of the batch."""
    T = batch.tokens.shape[1]
    used = (batch.segment_ids > 0) * (np.arange(T) + 1)
    return [min(bucket(max(1, int(n))), T) for n in used.max(axis=1)]


def passes(lengths: Mapping[int, Sequence[int]], tokens: int, parts: int) -> list[Pass]:
    """The passes of a round.

    Args:
      lengths: of the rows of each job's batch.
      tokens: the room of a pass.
      parts: devices over which the rows of a pass are split.

    Example::

      >>> passes({0: [64, 32, 32], 1: [32]}, tokens=64, parts=1)
      [Pass(length=64, rows=((0, 0),)), Pass(length=32, rows=((0, 1), (0, 2))), Pass(length=32, rows=((1, 0),))]
    """
    left = sorted(((-n, job, i) for job, own in lengths.items() for i, n in enumerate(own)))
    found = []
    while left:
        T = -left[0][0]
        count = room(T, tokens, parts)
        found.append(Pass(T, tuple((job, i) for _, job, i in left[:count])))
        left = left[count:]
    return found


def room(length: int, tokens: int, parts: int) -> int:
    """The number of rows of ``length`` tokens in a pass: a multiple of ``parts``, at least one for each."""
    return max(1, tokens // length // parts) * parts


def choose_tokens(loaders: Sequence[Loader], parts: int) -> int:
    """The room of a pass with which the first rounds of jobs that train side by side compute the fewest tokens.

    Args:
      loaders: of the jobs.
      parts: devices over which the rows of a pass are split.
    """
    rounds = [
        {job: row_lengths(batch_of_step(loader, step)) for job, loader in enumerate(loaders)} for step in range(ROUNDS)
    ]
    most = max(sum(sum(own) for own in one.values()) for one in rounds)
    longest = max(n for one in rounds for own in one.values() for n in own)
    tried = sorted({max(longest * parts, -(-most // n)) for n in CANDIDATES}, reverse=True)

    def cost(tokens: int) -> int:
        plans = [passes(one, tokens, parts) for one in rounds]
        return sum(own.length * room(own.length, tokens, parts) + OVERHEAD for plan in plans for own in plan)

    return min(tried, key=cost)


def loss_room(loaders: Sequence[Loader], length: int) -> int:
    """The maximum of loss tokens in a row of at most ``length`` tokens, over all batches of ``loaders``."""
    most = 1
    for loader in loaders:
        known = loader.max_loss_tokens
        most = max(most, *(count for T, count in known.items() if T <= length or loader.plan is not None), 1)
    return min(most, length)


def rows_of_pass(
    own: Pass,
    batches: Mapping[int, Batch],
    slots: Mapping[int, int],
    *,
    tokens: int,
    parts: int,
    loss_positions: int,
    dtype: np.dtype,
) -> Rows:
    """The arrays of a pass.

    Args:
      own: the pass.
      batches: of the round, by job.
      slots: of the jobs.
      tokens: the room of a pass.
      parts: devices over which its rows are split.
      loss_positions: K of the batch.
      dtype: of the weights.
    """
    count = room(own.length, tokens, parts)
    arrays = {name: np.zeros((count, own.length), np.int32) for name in Batch._fields[:4]}
    positions = np.zeros((count, loss_positions), np.int32)
    slot, number, weight = np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros(count, dtype)
    for at, (job, i) in enumerate(own.rows):
        batch = batches[job]
        for name, array in arrays.items():
            row = getattr(batch, name)[i, : own.length]
            array[at, : len(row)] = row
        assert batch.loss_positions is not None
        found = batch.loss_positions[i][:loss_positions]
        positions[at, : len(found)] = found
        slot[at], number[at], weight[at] = slots[job], i, 1 / max(1, loss_tokens(batch))
    return Rows(Batch(**arrays, loss_positions=positions), slot, number, weight)


def loss_tokens(batch: Batch) -> int:
    """The number of loss tokens of a batch."""
    assert batch.loss_positions is not None
    return int(np.count_nonzero(batch.loss_positions))
