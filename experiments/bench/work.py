"""The workload of ``bench.py train``, shared by all sides: shapes, tokens and labels. Imports no framework.

NumPy is imported lazily, so that a side can report a missing package even where NumPy is missing too.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Workload:
    """A training step; alpha is 2 r, the learning rate is 1e-4, and dropout is off."""

    shape: str  # the name of ``config``
    config: dict[str, Any]  # config.json of the model, read by all sides
    batch: int  # rows per step
    length: int  # tokens per row
    documents: int  # documents packed into each row, of equal length; attention does not cross them
    rank: int
    target: str | list[str]
    loss_fraction: float  # the share of each document, at its end, that has a loss
    dtype: str  # of the base and the matmuls; adapters are float32
    optimizer: str  # of our side; a peer always uses AdamW
    remat: str | None = None
    attention: str | None = None
    quantize: str | None = None
    accumulate: int = 1  # micro-batches per step
    devices: int | None = None  # of our side; None: one, or on a CPU as many cores as divide the rows

    @property
    def tokens_per_step(self) -> int:
        """All tokens of a batch, with or without a loss."""
        return self.batch * self.length

    @property
    def mean_attended_length(self) -> float:
        """``sum(len ** 2) / sum(len)`` over the documents of a row."""
        short, longer = divmod(self.length, self.documents)
        lengths = [short + (index < longer) for index in range(self.documents)]
        return sum(n * n for n in lengths) / self.length


def arrays(work: Workload) -> dict[str, np.ndarray]:
    """``tokens``, ``positions``, ``segment_ids`` (from 1) and ``loss_mask``, each (B, T) int32, from a fixed seed."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, work.config["vocab_size"], (work.batch, work.length))
    parts = [np.arange(len(part)) for part in np.array_split(np.arange(work.length), work.documents)]
    has_loss = [position >= len(position) - round(work.loss_fraction * len(position)) for position in parts]
    row = {
        "positions": np.concatenate(parts),
        "segment_ids": np.repeat(np.arange(work.documents) + 1, [len(part) for part in parts]),
        "loss_mask": np.concatenate([part & (position > 0) for part, position in zip(has_loss, parts, strict=True)]),
    }
    rows = {key: np.broadcast_to(value, tokens.shape) for key, value in row.items()}
    return {key: np.ascontiguousarray(value, np.int32) for key, value in {"tokens": tokens, **rows}.items()}


def to_json(work: Workload) -> str:
    """``work`` as JSON, for one command-line argument."""
    return json.dumps(dataclasses.asdict(work))


def from_json(text: str) -> Workload:
    """The inverse of :func:`to_json`."""
    return Workload(**json.loads(text))
