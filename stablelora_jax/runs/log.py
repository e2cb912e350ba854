"""What a run writes while it works: ``metrics.jsonl``, its trackers, and a progress bar on a terminal.

``metrics.jsonl`` holds each step once, also after a kill: what a resumed run will write again is dropped when it opens
its log. Its floats read back as the very numbers, and those that are not finite are ``null``. In memory stay only the
evaluations, what was trained on and which pairs have stopped shrinking.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import writing
from stablelora_jax.training.metrics import append_record, each_record, keep_records_until, plain
from stablelora_jax.optimizers import still_shrinking
from stablelora_jax.runs.files import METRICS
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.training.stability import Stability, by_name
from stablelora_jax.runs.trackers import open_trackers

NO_NUMBERS = ("applied", "skipped", "in_a_row", "latches", "stability")  # logged in another form, or not at all


class RunLog:
    """The log of one run, opened at ``step`` (0, or the checkpoint it goes on from); later records are dropped.

    Args:
      directory: of the run.
      step: steps done so far.
      steps: steps of the whole run, for the progress bar.
      schedule: the learning rate of an update by the number of those before it.
      spec: of the adapters.
      trackers: names of :data:`stablelora_jax.runs.trackers.TRACKERS`.
      writes: false in all processes of a run but one: they read the same records, and write and show nothing.

    Raises:
      InputError: a tracker that is not installed or cannot be reached.
      RunError: what cannot be written, here and in every method.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        steps: int,
        schedule: Callable[[Any], Any],
        spec: LoraSpec,
        *,
        trackers: Iterable[str] = ("tensorboard",),
        writes: bool = True,
    ) -> None:
        from tqdm import tqdm

        self.path, self.schedule, self.spec, self.writes = directory / METRICS, schedule, spec, writes
        self.step = step
        self.data: dict[str, Any] | None = None  # what is trained on
        self._evaluations: dict[int, dict[str, Any]] = {}
        self._stopped: set[str] = set()
        with writing(self.path):
            if writes:
                keep_records_until(self.path, step)
            for record in each_record(self.path):
                if record["step"] <= step:
                    self._take(record)
        self._trackers = open_trackers(directory, trackers, step) if writes else []
        hidden = not writes or not sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, desc="train", unit="step", disable=hidden)
        self._clock = time.monotonic()

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation written at ``step``, or None."""
        return self._evaluations.get(step)

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Every evaluation written so far, by step."""
        return dict(self._evaluations)

    def write_data(self, statistics: dict[str, Any], *, accept_changes: bool = False) -> None:
        """Record what is trained on: once a run, and where it has changed and that is accepted.

        Raises:
          InputError: a run that goes on has other data than it began with.
        """
        same = self.data is not None and self.data.get("digest") == statistics["digest"]
        if self.data is None or (accept_changes and not same):
            self._write({"step": self.step, "data": statistics})
        elif not same:
            raise InputError(f"{self.path.parent} was begun with other training data: choose another output=")

    def write_evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Record loss, accuracies and the answers given on the held-out split."""
        self._write({"step": step, "validation": result})
        self._track(step, "validation", {k: result[k] for k in ("loss", "acc", "acc_norm") if k in result})
        self._clock = time.monotonic()

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of step number ``step`` (from 1), as :func:`make_train_step` returns them.

        ``applied``, the number of updates before this step, decides the learning rate (``step - 1`` where it is
        absent); ``skipped`` is recorded as true where it is not 0. Where there is ``stability``, as
        :func:`make_stability_view` returns it, so is it in the record.
        """
        if not self.writes:
            return
        numbers = {name: float(value) for name, value in metrics.items() if name not in NO_NUMBERS}
        tokens, now = numbers.pop("tokens"), time.monotonic()
        latches = still_shrinking(metrics["latches"], self.spec.stacked) if metrics["latches"] else {}
        stopped = sorted(name for name, on in latches.items() if not on and name not in self._stopped)
        record: dict[str, Any] = {"step": step, **numbers}
        record["learning_rate"] = float(self.schedule(int(metrics.get("applied", step - 1))))
        record |= {"tokens_per_second": tokens / max(now - self._clock, 1e-9), "shrinking": sum(latches.values())}
        record |= {"skipped": True} if metrics.get("skipped", 0) else {}
        self._clock = now
        shown = {name: value for name, value in record.items() if name != "step"}
        terms = by_name(metrics["stability"], self.spec) if "stability" in metrics else {}
        marked = {n: {**t, **({"shrinking": latches[n]} if n in latches else {})} for n, t in terms.items()}
        self._write(record | ({"stopped": stopped} if stopped else {}) | ({"stability": marked} if marked else {}))
        self._track(step, "train", shown)
        if terms:
            means = {name: sum(t[name] for t in terms.values()) / len(terms) for name in Stability._fields}
            self._track(step, "stability", means)
        speed = f"{record['tokens_per_second']:.0f}"
        self._bar.set_postfix(loss=f"{numbers['loss']:.4f}", tokens_per_s=speed, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Flush and close."""
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()

    def _take(self, record: Mapping[str, Any]) -> None:
        """Keep of a record what is asked for later; ``null`` is the number that JSON has no word for."""
        if "validation" in record:
            found = {k: math.nan if v is None else v for k, v in record["validation"].items()}
            self._evaluations[record["step"]] = found
        self.data = record.get("data", self.data)
        self._stopped.update(record.get("stopped", ()))

    def _write(self, record: dict[str, Any]) -> None:
        if self.writes:
            with writing(self.path):
                append_record(self.path, record)
        self._take(record)

    def _track(self, step: int, group: str, numbers: Mapping[str, Any]) -> None:
        finite = {f"{group}/{name}": float(value) for name, value in numbers.items() if plain(value) is not None}
        for tracker in self._trackers:
            tracker.write(step, finite)
