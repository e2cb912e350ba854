"""What a run writes while it works: ``metrics.jsonl``, TensorBoard, and a progress bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stablelora_jax.errors import InputError
from stablelora_jax.metrics import append_record, keep_records_until
from stablelora_jax.optimize import still_shrinking
from stablelora_jax.run_directory import METRICS
from stablelora_jax.spec import LoraSpec
from stablelora_jax.stability import Stability, by_name
from stablelora_jax.tree import Path as ModulePath


class RunLog:
    """The log of one run, opened at ``step`` (0, or the checkpoint it goes on from); later records are dropped."""

    def __init__(self, directory: Path, step: int, steps: int, schedule: Callable[[Any], Any], spec: LoraSpec) -> None:
        from tensorboardX import SummaryWriter

        self.path = directory / METRICS
        self.records = keep_records_until(self.path, step)
        self.schedule, self.spec = schedule, spec
        self.stopped = {name for record in self.records for name in record.get("stopped", ())}
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)
        self.bar = tqdm(total=steps, initial=step, desc="train", unit="step", disable=not sys.stderr.isatty())
        self.clock = time.monotonic()

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation written at ``step``, or None."""
        return self.evaluations().get(step)

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Every evaluation written so far, by step."""
        return {r["step"]: r["validation"] for r in self.records if "validation" in r}

    def write_data(self, statistics: dict[str, Any]) -> None:
        """Record what is trained on, once a run.

        Raises:
          InputError: a run that goes on has other data than it began with.
        """
        began = next((r["data"] for r in self.records if "data" in r), None)
        if began is None:
            self._write({"step": 0, "data": statistics})
        elif began["digest"] != statistics["digest"]:
            raise InputError(f"{self.path.parent} was begun with other training data: choose another output=")

    def write_evaluation(self, step: int, result: dict[str, Any]) -> None:
        """Record loss, accuracies and the answers given on the held-out split."""
        self._write({"step": step, "validation": result})
        for name in {"loss", "acc", "acc_norm"} & result.keys():
            self.board.add_scalar(f"validation/{name}", result[name], step)
        self.clock = time.monotonic()

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of update number ``step`` (from 1), as :func:`make_train_step` returns them.

        Where they hold ``stability``, as :func:`make_stability_view` returns it, so does the record.
        """
        numbers = {name: float(value) for name, value in metrics.items() if name not in ("latches", "stability")}
        tokens, now = numbers.pop("tokens"), time.monotonic()
        latches = still_shrinking(metrics["latches"], self.spec.stacked) if metrics["latches"] else {}
        stopped = sorted(name for name, on in latches.items() if not on and name not in self.stopped)
        self.stopped.update(stopped)
        record = {"step": step, **numbers, "learning_rate": float(self.schedule(step - 1))}
        record |= {"tokens_per_second": tokens / max(now - self.clock, 1e-9), "shrinking": sum(latches.values())}
        self.clock = now
        terms = self._stability(step, metrics["stability"], latches) if "stability" in metrics else {}
        self._write(record | ({"stopped": stopped} if stopped else {}) | ({"stability": terms} if terms else {}))
        for name, value in record.items():
            self.board.add_scalar(f"train/{name}", value, step)
        self.bar.update()
        self.bar.set_postfix(loss=f"{numbers['loss']:.4f}", tokens_per_s=f"{record['tokens_per_second']:.0f}")

    def close(self) -> None:
        """Flush and close."""
        self.bar.close()
        self.board.close()

    def _stability(
        self, step: int, view: Mapping[ModulePath, Stability], latches: Mapping[str, bool]
    ) -> dict[str, dict[str, Any]]:
        """The terms by module, with the latch where there is one; their means go to the board."""
        named = by_name(view, self.spec)
        for field in Stability._fields:
            self.board.add_scalar(f"stability/{field}", sum(t[field] for t in named.values()) / len(named), step)
        latch = {name: {"shrinking": on} for name, on in latches.items()}
        return {name: {**terms, **latch.get(name, {})} for name, terms in named.items()}

    def _write(self, record: dict[str, Any]) -> None:
        append_record(self.path, record)
        self.records.append(record)
