"""The part of a run's records that later decisions need, kept in memory: evaluations, data and stopped pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stablelora_jax.runs.records import each_record

Evaluation = dict[str, Any]  # loss, acc, acc_norm, questions, answers


@dataclass
class History:
    """What the records so far say; :meth:`add` takes them one by one."""

    data: dict[str, Any] | None = None  # statistics of the training data
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # by step
    stopped: set[str] = field(default_factory=set)  # names of the pairs that have stopped shrinking

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one record; ``null`` in an evaluation is a number that is not finite."""
        if "validation" in record:
            found = {key: math.nan if value is None else value for key, value in record["validation"].items()}
            self.evaluations[record["step"]] = found
        self.data = record.get("data", self.data)
        self.stopped.update(record.get("stopped", ()))


def read_history(path: Path, step: int) -> History:
    """The history of the records in ``path`` up to ``step``; empty where the file does not exist.

    Raises:
      InputError: a record that no run writes.
    """
    history = History()
    for record in each_record(path):
        if record["step"] <= step:
            history.add(record)
    return history
