"""The batches of a run, as a function of the step: padded by bucket, or packed; each process makes only its part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from stablelora_jax.data.batch import Batch, bucket, make_batch
from stablelora_jax.data.order import rows_of_step
from stablelora_jax.data.packing import Plan, pack, plan_of
from stablelora_jax.data.token_cache import TokenStore, loss_counts

ROUND_TO = 16  # the number of loss positions of a row is a multiple of it


class Loader(NamedTuple):
    """The data of a run and how it is batched; nothing in it changes during a run."""

    store: TokenStore
    plan: Plan | None  # the texts of each row; None: one text a row
    max_length: int  # tokens of a packed row; the maximum of another
    batch_size: int  # rows of a step, over all hosts
    seed: int
    max_loss_tokens: Mapping[
        int, int
    ]  # T -> the maximum of loss tokens of a row of T, rounded up: one shape for each T
    group: int = 1  # rows of one text that belong together and follow one another

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self.store.lengths) if self.plan is None else len(self.plan.starts) - 1


def make_loader(
    store: TokenStore,
    *,
    batching: Literal["bucket", "pack"],
    max_length: int,
    batch_size: int,
    seed: int,
    group: int = 1,
) -> Loader:
    """A loader over ``store``, whose texts have at most ``max_length`` tokens; ``group`` of them stay together."""
    plan = plan_of(store.rows) if batching == "pack" else None
    return Loader(store, plan, max_length, batch_size, seed, _max_loss_tokens(store, plan, max_length), group)


def batch_of_step(loader: Loader, step: int, part: slice = slice(None)) -> Batch:
    """The rows of step ``step`` (from 0), or of them the ``part`` that a process reads.

    T is the same for every part: the row's length where rows are packed, else the bucket of the step's longest text.
    """
    rows, store = _rows(loader, step), loader.store
    if loader.plan is None:
        longest = int(store.lengths[rows].max())
        examples = [store.example(row) for row in rows[part]]
        return make_batch(examples, longest=longest, max_loss_tokens=loader.max_loss_tokens[bucket(longest)])
    packed = [[store.example(i) for i in texts] for texts in texts_of_rows(loader, rows[part])]
    return pack(packed, loader.max_length, loader.max_loss_tokens[loader.max_length])


def _rows(loader: Loader, step: int) -> list[int]:
    """The rows of a step; groups are shuffled, and what is within them is not."""
    n = loader.group
    groups = rows_of_step(step, loader.batch_size // n, loader.rows // n, loader.seed)
    return [group * n + i for group in groups for i in range(n)]


def texts_of_rows(loader: Loader, rows: Sequence[int]) -> list[list[int]]:
    """The numbers of the texts in each of ``rows``, in the order of the data set."""
    if loader.plan is None:
        return [[row] for row in rows]
    texts, starts = loader.plan
    return [[int(i) for i in texts[starts[row] : starts[row + 1]]] for row in rows]


def most_segments(loader: Loader) -> int:
    """The maximum number of segments of a row, with the pads of a packed row as one; 1 where a row is one text."""
    return 1 if loader.plan is None else int(np.diff(loader.plan.starts).max()) + 1


def longest_row(loader: Loader) -> int:
    """The largest T of a batch."""
    return max(loader.max_loss_tokens)


def _max_loss_tokens(store: TokenStore, plan: Plan | None, length: int) -> dict[int, int]:
    lengths = np.asarray(store.lengths)
    counts = loss_counts(store)
    if plan is not None:
        return {length: _rounded(int(np.add.reduceat(counts[plan.texts], plan.starts[:-1]).max()), length)}
    rows = np.array([bucket(int(n)) for n in range(int(lengths.max()) + 1)])[lengths]
    return {int(T): _rounded(int(counts[rows <= T].max()), int(T)) for T in np.unique(rows)}


def _rounded(count: int, most: int) -> int:
    return min(most, -(-max(count, 1) // ROUND_TO) * ROUND_TO)


def statistics(loader: Loader, steps: int) -> dict[str, Any]:
    """Statistics of a run of ``steps`` steps: counts of one epoch, the number of epochs, and the share of pads.

    The pads are counted exactly: over all rows where they are packed, else over the steps of the first epoch.
    """
    lengths = np.asarray(loader.store.lengths)
    if loader.plan is not None:
        kept, space = int(lengths.sum()), loader.rows * loader.max_length
    else:
        first = range(min(steps, -(-loader.rows // loader.batch_size)))
        rows = [lengths[_rows(loader, step)] for step in first]
        kept, space = sum(int(n.sum()) for n in rows), sum(len(n) * bucket(int(n.max())) for n in rows)
    return {
        "texts": len(lengths),
        "rows": loader.rows,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "loss_tokens": int(loss_counts(loader.store).sum(dtype=np.int64)),
        "cut": loader.store.cut,
        "padding": 1 - kept / space,
        "epochs": steps * loader.batch_size / loader.rows,
        "digest": loader.store.digest,
    }
