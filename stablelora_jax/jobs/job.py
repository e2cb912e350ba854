"""One of several jobs: its run directory, log and checkpoints, as those of any other run."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

from stablelora_jax.parallel import is_primary
from stablelora_jax.runs.directory import RunDirectory, create, lock
from stablelora_jax.runs.early_stopping import best_step
from stablelora_jax.runs.files import CHECKPOINTS
from stablelora_jax.runs.log import RunLog
from stablelora_jax.runs.loop import StepResult, run_control
from stablelora_jax.runs.prepare import TrainingSetup
from stablelora_jax.runs.run import finish, keep_adapter, open_run_log, require_update, restored
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import TrainState


@dataclass
class Job:
    """A job that is prepared: what it is, and while it trains, what it has open."""

    name: str
    located: RunDirectory
    setup: TrainingSetup
    first: int | None  # the checkpoint that it goes on from
    log_fn: Callable[[str], None]
    number: int = 0  # steps so far
    began: float = field(default_factory=time.monotonic)
    control: Generator[int, StepResult | None, TrainState] | None = None
    log: RunLog | None = None
    manager: Any = None
    stack: ExitStack = field(default_factory=ExitStack)

    def start(self) -> TrainState:
        """The state that it begins with, host arrays."""
        if self.first is None:
            return self.setup.start
        return restored(self.setup, self.located.path / CHECKPOINTS, self.first, self.setup.config.accept_changes)

    def open(
        self, placed: Callable[[], TrainState], received: Callable[[], int], committed: Callable[[], int | None]
    ) -> None:
        """Begin: take the directory, open log and checkpoints, and evaluate where that is due.

        Args:
          placed: gives the state on the devices.
          received: gives the signal that asks the run to end, or 0.
          committed: the step of this job that the last record of all jobs names: its checkpoint stays.

        Raises:
          StopIteration: no step is left.
          InputError: the directory cannot be written, or is another run's.
        """
        self.began, self.number = time.monotonic(), self.first or 0
        config, checkpoints = self.setup.config, self.located.path / CHECKPOINTS
        if is_primary():
            self.stack.enter_context(lock(self.located.path))
            create(self.located, config, self.number)
        self.log = self.stack.enter_context(closing(open_run_log(self.setup, self.number, progress=False)))
        history = self.log.history

        def also() -> tuple[int, ...]:
            step = committed()
            return () if step is None else (step,)

        self.manager = self.stack.enter_context(
            checkpoint.open_manager(
                checkpoints,
                keep=config.keep_checkpoints,
                best=lambda: best_step(history.evaluations, config.metric),
                also=also,
            )
        )
        self.control = run_control(self.setup, self.number, placed, self.manager, self.log, received, every=None)
        self.number = next(self.control)

    def send(self, result: StepResult | None) -> None:
        """Give it the result of a step; afterwards ``number`` says how many steps it has done.

        Raises:
          StopIteration: it has ended, and its value is the last state.
        """
        assert self.control is not None
        self.number = self.control.send(result)

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Write the adapter, the pictures and the summary, which is returned; and close."""
        assert self.log is not None
        checkpoint.wait(self.manager)
        require_update(state)
        step = keep_adapter(self.setup, state, self.located.path / CHECKPOINTS, self.log)
        summary = finish(self.setup, self.log, int(state.step), step, time.monotonic() - self.began, self.log_fn)
        self.close()
        return summary

    def saved(self) -> bool:
        """Wait for the checkpoints; whether that of ``number`` is there."""
        checkpoint.wait(self.manager)
        return self.number in checkpoint.steps(self.manager)

    def close(self) -> None:
        """Release directory, log and checkpoints."""
        self.stack.close()


def resume_step(located: RunDirectory, committed: int | None) -> int | None:
    """The checkpoint from which a job goes on: that of the last record of all jobs if it is there, else the newest.

    Raises:
      InputError: the newest checkpoint is damaged.
    """
    checkpoints = located.path / CHECKPOINTS
    checkpoint.require_undamaged(checkpoints)
    there = checkpoint.steps(checkpoints)
    return committed if committed in there else max(there, default=None)
