"""The batches of a run, as a function of the step: padded by bucket, or packed; each process makes only its part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from stablelora_jax.data.batch import Batch, bucket, make_batch
from stablelora_jax.data.order import rows_of_step
from stablelora_jax.data.packing import Plan, pack, plan_of
from stablelora_jax.data.token_cache import TokenStore


class Loader(NamedTuple):
    """What batches are made of; nothing in it changes while a run goes on."""

    store: TokenStore
    plan: Plan | None  # the texts of each row; None: one text a row
    length: int  # of a packed row, the most of another
    batch_size: int  # rows of a step, over all hosts
    seed: int

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self.store.lengths) if self.plan is None else len(self.plan.starts) - 1


def make_loader(
    store: TokenStore, *, batching: Literal["bucket", "pack"], length: int, batch_size: int, seed: int
) -> Loader:
    """A loader over ``store``, whose texts have at most ``length`` tokens."""
    return Loader(store, plan_of(store.rows) if batching == "pack" else None, length, batch_size, seed)


def batch_of_step(loader: Loader, step: int, part: slice = slice(None)) -> Batch:
    """The rows of step ``step`` (from 0), or of them the ``part`` that a process reads.

    T is the same for every part: the row's length where rows are packed, else the bucket of the step's longest text.
    """
    rows, store = rows_of_step(step, loader.batch_size, loader.rows, loader.seed), loader.store
    if loader.plan is None:
        return make_batch([store.example(row) for row in rows[part]], longest=int(store.lengths[rows].max()))
    return pack([[store.example(i) for i in texts] for texts in texts_of_rows(loader, rows[part])], loader.length)


def texts_of_rows(loader: Loader, rows: Sequence[int]) -> list[list[int]]:
    """The numbers of the texts in each of ``rows``, in the order of the data set."""
    if loader.plan is None:
        return [[row] for row in rows]
    texts, starts = loader.plan
    return [[int(i) for i in texts[starts[row] : starts[row + 1]]] for row in rows]


def statistics(loader: Loader, steps: int) -> dict[str, Any]:
    """What a run of ``steps`` steps goes through: counts of one epoch, epochs, and the share of pads.

    The pads are counted exactly: over all rows where they are packed, else over the steps of the first epoch.
    """
    lengths, answers = np.asarray(loader.store.lengths), np.asarray(loader.store.answers)
    if loader.plan is not None:
        kept, space = int(lengths.sum()), loader.rows * loader.length
    else:
        first = range(min(steps, -(-loader.rows // loader.batch_size)))
        rows = [lengths[rows_of_step(step, loader.batch_size, loader.rows, loader.seed)] for step in first]
        kept, space = sum(int(n.sum()) for n in rows), sum(len(n) * bucket(int(n.max())) for n in rows)
    return {
        "texts": len(lengths),
        "rows": loader.rows,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "loss_tokens": int((lengths - np.maximum(answers, 1)).sum(dtype=np.int64)),
        "cut": loader.store.cut,
        "padding": 1 - kept / space,
        "epochs": steps * loader.batch_size / loader.rows,
        "digest": loader.store.digest,
    }
