"""The points of a sweep on several workers of Ray, which share a file system.

The points are divided into *shards* of at most ``at_once`` points. Each is a task: ``train_jobs`` with a record of its
own in ``OUTPUT/shards/<digest of its points>``, while run directories stay ``OUTPUT/<point>``. The same shard goes on
from its record. Points that come into other shards (other workers, more points) go on from their newest checkpoints.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from stablelora_jax.config import Section, option
from stablelora_jax.config.keys import PositiveFloat, PositiveInt
from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs.cluster import cluster
from stablelora_jax.jobs.file import JobsConfig, read_record
from stablelora_jax.jobs.run import finished
from stablelora_jax.jobs.shards import LOG, SHARDS, Outcome, digest, divide, gather, train_shard
from stablelora_jax.runs.directory import RunDirectory, locate, lock
from stablelora_jax.runs.trackers import require_installed
from stablelora_jax.utils.errors import InputError, Interrupted, RunError, named
from stablelora_jax.utils.signals import catch_signals

RETRIES = 2  # of a shard whose worker has died
POLL = 0.5  # seconds


@dataclass(frozen=True)
class Spread(Section):
    """Workers of Ray."""

    address: str | None = option(
        None, "of a cluster; auto: that of this machine; null: RAY_ADDRESS, else Ray starts here"
    )
    workers: PositiveInt = option(2, "number of shards that are trained at the same time")
    cpus_per_worker: PositiveFloat = option(1.0, "CPU cores that Ray reserves for each worker")
    gpus_per_worker: Annotated[float, Meta(ge=0)] = option(0.0, "GPUs that Ray reserves for each worker")


def train_spread(
    spread: Spread,
    jobs: JobsConfig,
    groups: Iterable[Sequence[str]],
    configs: Mapping[str, RunConfig],
    log_fn: Callable[[str], None] = print,
) -> Outcome:
    """``train_jobs`` of several groups of points on the workers of Ray.

    A shard whose worker dies is tried again; then its points fail, in this call alone.

    Args:
      spread: the workers.
      jobs: ``output``, ``at_once`` of a worker, ``tokens``.
      groups: names of points that can be trained side by side.
      configs: the configuration of each point.
      log_fn: takes lines of text.

    Raises:
      InputError: an input that cannot be used; other shards are saved first.
      Interrupted: SIGTERM or SIGINT came; all points under way are saved.
    """
    output, located = Path(jobs.output), {name: locate(config) for name, config in configs.items()}
    for config in configs.values():
        require_installed(config.trackers)
        if config.distributed is not None:
            raise InputError("ray and distributed exclude each other: leave one of them out")
    shards = {digest(names): names for own in groups for names in divide(own, spread.workers, jobs.at_once)}
    with cluster(spread.address, spread.cpus_per_worker, spread.gpus_per_worker, log_fn), lock(output / SHARDS):
        record = gather(output, configs, shards)
        record.steps = {name: step for name, step in record.steps.items() if name not in configs}
        record.write()
        course = _Course(spread, jobs, shards, configs, located, log_fn, *(finished(located), dict(record.failed)))
        course.run()
        gather(output, configs, shards).write()
    if course.error is not None:
        raise course.error
    return course.done, {name: why for name, why in course.failed.items() if name in configs}


@dataclass
class _Course:
    """Shards that wait, are trained, and end."""

    spread: Spread
    jobs: JobsConfig
    shards: Mapping[str, Sequence[str]]
    configs: Mapping[str, RunConfig]
    located: Mapping[str, RunDirectory]
    log_fn: Callable[[str], None]
    done: dict[str, dict[str, Any]]
    failed: dict[str, str]
    going: dict[Any, str] = field(default_factory=dict)  # the shard of each task
    read: dict[str, int] = field(default_factory=dict)  # bytes of each shard's log
    error: InputError | Interrupted | None = None

    def run(self) -> None:
        """Train until no shard is left, or an error or a signal has stopped those under way."""
        import ray

        for name in [name for name in self.configs if name in self.done or name in self.failed]:
            why = f"has failed before ({self.failed[name]})" if name in self.failed else "is finished"
            self.log_fn(f"{name} {why}")
        waiting = [key for key, names in self.shards.items() if not self.done.keys() | self.failed.keys() >= set(names)]
        with catch_signals() as received:
            while self.going or (waiting and self.error is None):
                while waiting and len(self.going) < self.spread.workers and self.error is None:
                    self._begin(waiting.pop(0))
                ready, _ = ray.wait(list(self.going), timeout=POLL)
                self._follow()
                for task in ready:
                    self._end(task)
                if received() and not isinstance(self.error, Interrupted):
                    name = signal.Signals(received()).name
                    text = f"{name}: all points are saved, and the same command goes on from there"
                    self._stop(Interrupted(received(), text))

    def _begin(self, key: str) -> None:
        """Give the shard its record and a task."""
        import ray

        names, directory = self.shards[key], Path(self.jobs.output) / SHARDS / key
        directory.mkdir(parents=True, exist_ok=True)
        record = read_record(directory)
        record.failed = {name: self.failed[name] for name in names if name in self.failed}
        record.write()
        with suppress(FileNotFoundError):
            self.read[key] = (directory / LOG).stat().st_size
        own = JobsConfig(output=str(directory), at_once=self.jobs.at_once, tokens=self.jobs.tokens)
        needs = {"num_cpus": self.spread.cpus_per_worker, "num_gpus": self.spread.gpus_per_worker}
        task = ray.remote(train_shard).options(max_retries=RETRIES, **needs)
        self.going[task.remote(own, {name: self.configs[name] for name in names}, os.getcwd())] = key

    def _end(self, task: Any) -> None:
        """Take the result of a task, or what is left of it."""
        import ray

        key = self.going.pop(task)
        try:
            result = ray.get(task)
        except ray.exceptions.RayError as error:
            result = RunError(f"{self._label(key)} has died ({named(error)}); the same command tries it again")
        if isinstance(result, InputError):
            self._stop(result)
        elif isinstance(result, RunError):
            names = self.shards[key]
            self.done |= finished({name: self.located[name] for name in names})
            left = [name for name in names if name not in self.done and name not in self.failed]
            self.failed |= dict.fromkeys(left, str(result))
            if self.error is None:
                self.log_fn(str(result))
        else:
            self.done, self.failed = self.done | result[0], self.failed | result[1]

    def _stop(self, error: InputError | Interrupted) -> None:
        """Ask all workers to save and to end, as a SIGINT does."""
        import ray

        self.error = error
        for task in self.going:
            ray.cancel(task)

    def _follow(self) -> None:
        """Log what the workers have written."""
        for key in self.going.values():
            path = Path(self.jobs.output) / SHARDS / key / LOG
            with suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(self.read.get(key, 0))
                whole = file.read().rpartition(b"\n")
                self.read[key] = self.read.get(key, 0) + len(whole[0] + whole[1])
                for line in whole[0].decode(errors="replace").splitlines():
                    self.log_fn(f"{self._label(key)}: {line}")

    def _label(self, key: str) -> str:
        return f"shard {list(self.shards).index(key) + 1} of {len(self.shards)}"
