"""What ``bench.py train`` measures, said once for both sides: shapes, tokens, labels. Imports no framework.

A side whose environment lacks NumPy, too, can so say what it lacks.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Work:
    """A training step; alpha is 2 r, the learning rate 1e-4, and dropout is off."""

    shape: str  # the name of ``config``
    config: dict[str, Any]  # config.json of the model, read by both sides
    batch: int
    length: int
    documents: int  # texts of a row, all as long: attention does not cross them
    rank: int
    target: str | list[str]
    loss_fraction: float  # the last so many tokens of each text are learnt
    dtype: str  # of base and matrix products; adapters are float32
    optimizer: str  # of our side; the peer's is AdamW
    remat: str | None = None
    attention: str | None = None
    quantize: str | None = None
    accumulate: int = 1  # micro-batches that the rows are cut into
    devices: int | None = None  # that our side spreads the rows over; None: one, or of a CPU's cores as many as fit

    @property
    def tokens_per_step(self) -> int:
        """All tokens of a batch, learnt or not, on both sides."""
        return self.batch * self.length

    @property
    def attended(self) -> float:
        """``sum(len ** 2) / sum(len)`` over the texts of a row."""
        short, longer = divmod(self.length, self.documents)
        lengths = [short + (place < longer) for place in range(self.documents)]
        return sum(n * n for n in lengths) / self.length


def arrays(work: Work) -> dict[str, np.ndarray]:
    """``tokens``, ``positions``, ``segment_ids`` (from 1) and ``loss_mask``, each (B, T) int32; from one seed."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, work.config["vocab_size"], (work.batch, work.length))
    parts = [np.arange(len(part)) for part in np.array_split(np.arange(work.length), work.documents)]
    learnt = [position >= len(position) - round(work.loss_fraction * len(position)) for position in parts]
    row = {
        "positions": np.concatenate(parts),
        "segment_ids": np.repeat(np.arange(work.documents) + 1, [len(part) for part in parts]),
        "loss_mask": np.concatenate([part & (position > 0) for part, position in zip(learnt, parts, strict=True)]),
    }
    rows = {key: np.broadcast_to(value, tokens.shape) for key, value in row.items()}
    return {key: np.ascontiguousarray(value, np.int32) for key, value in {"tokens": tokens, **rows}.items()}


def dumped(work: Work) -> str:
    """As one argument of a command line."""
    return json.dumps(dataclasses.asdict(work))


def loaded(text: str) -> Work:
    """What :func:`dumped` has written."""
    return Work(**json.loads(text))
