"""The batches of a run, as a function of the step: padded by bucket, or packed; each host makes only its share."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from stablelora_jax.data.batch import Batch, bucket, make_batch
from stablelora_jax.data.order import host_rows, rows_of_step
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


def batch_of_step(loader: Loader, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
    """The rows of step ``step`` (from 0) that process ``process_index`` of ``process_count`` reads.

    T is the same on every host: the row's length where rows are packed, else the bucket of the step's longest text.

    Raises:
      InputError: the rows of a step do not divide over the processes.
    """
    rows = rows_of_step(step, loader.batch_size, loader.rows, loader.seed)
    mine, store = host_rows(rows, process_index, process_count), loader.store
    if loader.plan is None:
        return make_batch([store.example(row) for row in mine], longest=int(store.lengths[rows].max()))
    texts, starts = loader.plan
    return pack([[store.example(i) for i in texts[starts[row] : starts[row + 1]]] for row in mine], loader.length)


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
