"""The log of a run: every record goes to ``metrics.jsonl``, to the history in memory, to trackers, to the progress bar.

``metrics.jsonl`` holds each step once, also after a kill: when a resumed run opens its log, records after the step of
its checkpoint are dropped. Floats read back as the same numbers; those that are not finite are ``null``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optax

from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.runs.files import METRICS
from stablelora_jax.runs.history import Evaluation, History, read_history
from stablelora_jax.runs.progress import advance, open_progress
from stablelora_jax.runs.records import append_record, keep_records_until
from stablelora_jax.runs.step_record import step_record, tracker_scalars
from stablelora_jax.runs.trackers import Tracker, open_trackers
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import writing


@dataclass
class RunLog:
    """The open log of one run, made by :func:`open_log`. Every method raises RunError where it cannot write."""

    path: Path  # of metrics.jsonl
    step: int  # at which it was opened
    schedule: optax.Schedule  # learning rate by the number of updates so far
    spec: LoraSpec
    history: History
    trackers: list[Tracker]
    progress: Any  # tqdm
    writes: bool  # false in all processes of a run but one
    clock: float = field(default_factory=time.monotonic)  # when the last record was written

    def write_data(self, statistics: dict[str, Any], *, accept_changes: bool = False) -> None:
        """Record the statistics of the training data: once a run, and again where a change of data is accepted.

        Raises:
          InputError: a resumed run has other data than it began with.
        """
        known = self.history.data
        same = known is not None and known.get("digest") == statistics["digest"]
        if known is None or (accept_changes and not same):
            self._write({"step": self.step, "data": statistics})
        elif not same:
            raise InputError(f"{self.path.parent} was begun with other training data: choose another output=")

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record loss, accuracies and answers on the validation set."""
        self._write({"step": step, "validation": evaluation})
        self.clock = time.monotonic()

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of step number ``step`` (from 1), as :func:`step_record` takes them.

        ``applied``, the number of updates before this step, gives the learning rate (``step - 1`` where it is absent).
        """
        if not self.writes:
            return
        rate = float(self.schedule(int(metrics.get("applied", step - 1))))
        now, stopped = time.monotonic(), self.history.stopped
        record = step_record(step, metrics, self.spec, learning_rate=rate, seconds=now - self.clock, stopped=stopped)
        self.clock = now
        self._write(record)
        advance(self.progress, record)

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        self.progress.close()
        for tracker in self.trackers:
            tracker.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self.writes:
            with writing(self.path):
                append_record(self.path, record)
        self.history.add(record)
        if scalars := tracker_scalars(record):
            for tracker in self.trackers:
                tracker.write(record["step"], scalars)


def open_log(
    directory: Path,
    step: int,
    steps: int,
    schedule: optax.Schedule,
    spec: LoraSpec,
    *,
    trackers: Iterable[str] = ("tensorboard",),
    writes: bool = True,
    progress: bool = True,
) -> RunLog:
    """Open the log of a run at ``step``: 0, or the checkpoint from which it is resumed. Later records are dropped.

    Args:
      directory: of the run.
      step: steps done so far.
      steps: steps of the whole run, for the progress bar.
      schedule: the learning rate by the number of updates so far.
      spec: of the adapters.
      trackers: names of :data:`stablelora_jax.runs.trackers.TRACKERS`.
      writes: false in all processes of a run but one: they read the same records, and write and show nothing.
      progress: show the progress on stderr.

    Raises:
      InputError: a tracker that is not installed or cannot be reached; a damaged ``metrics.jsonl``.
      RunError: ``metrics.jsonl`` cannot be read or written.
    """
    path = directory / METRICS
    with writing(path):
        if writes:
            keep_records_until(path, step)
        history = read_history(path, step)
    opened = open_trackers(directory, trackers, step) if writes else []
    shown = open_progress(step, steps, hidden=not (writes and progress))
    return RunLog(path, step, schedule, spec, history, opened, shown, writes)
