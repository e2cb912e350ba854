"""``stablelora train --jobs``: several runs side by side, each with a run directory like any other.

The jobs advance in rounds (:mod:`stablelora_jax.jobs.plan`). All are saved at the same rounds, and ``jobs.json`` then
names their steps: whatever ends the process, the same command goes on from there, with the same bits.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs.file import RECORD, JobsConfig, Record, read_record
from stablelora_jax.jobs.job import Job, resume_step
from stablelora_jax.jobs.kinds import kinds_of, require_together
from stablelora_jax.jobs.rounds import Rounds
from stablelora_jax.parallel import initialize, is_primary, require_devices
from stablelora_jax.runs.directory import RunDirectory, locate, read_summary
from stablelora_jax.runs.files import has_adapter, is_run
from stablelora_jax.runs.prepare import load_base, prepare
from stablelora_jax.runs.progress import open_progress
from stablelora_jax.runs.run import memory_errors
from stablelora_jax.runs.trackers import require_installed
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import TrainState
from stablelora_jax.utils import compile_cache
from stablelora_jax.utils.errors import InputError, Interrupted, RunError
from stablelora_jax.utils.signals import catch_signals


def run_jobs(
    jobs: JobsConfig, configs: Mapping[str, RunConfig], log_fn: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """:func:`train_jobs` of which none may fail; the summaries by name.

    Raises:
      RunError: some job has failed; the others are finished. Else as :func:`train_jobs`.
    """
    done, failed = train_jobs(jobs, configs, log_fn)
    if failed:
        names, path = ", ".join(failed), Path(jobs.output) / RECORD
        raise RunError(f"{len(failed)} of {len(configs)} jobs failed ({names}); see {path}")
    return done


@memory_errors()
def train_jobs(
    jobs: JobsConfig, configs: Mapping[str, RunConfig], log_fn: Callable[[str], None] = print
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Train all jobs, or go on with them.

    Returns the summaries by name, of those that have ended before, too; and why others have failed, by name.

    Args:
      jobs: the file.
      configs: the configuration of each job; ``output`` of each is its run directory.
      log_fn: takes lines of text.

    Raises:
      InputError: an input that cannot be used; raised before training.
      Interrupted: SIGTERM or SIGINT came; all jobs are saved.
    """
    compile_cache.enable()
    first = next(iter(configs.values()))
    if first.distributed is not None:
        initialize(**asdict(first.distributed))
    require_devices()
    log_fn = log_fn if is_primary() else lambda text: None
    record = read_record(Path(jobs.output))
    located = {name: locate(config) for name, config in configs.items()}
    done = finished(located)
    places = {name: own.path for name, own in located.items()}
    for name in [name for name in record.failed if not is_run(places.get(name, Path(jobs.output) / name))]:
        del record.failed[name]  # somebody has removed its directory
    failed = {name: why for name, why in record.failed.items() if name in configs}
    ended = {*done, *failed}
    for name in (*done, *failed):
        log_fn(f"{name} is finished" if name in done else f"{name} has failed before ({failed[name]})")
    if len(ended) < len(configs):
        prepared = _prepared(configs, located, record, log_fn)
        done |= _Course(jobs, prepared, record, log_fn).run(ended)
    return {name: done[name] for name in configs if name in done}, {
        name: why for name, why in record.failed.items() if name in configs
    }


def finished(located: Mapping[str, RunDirectory]) -> dict[str, dict[str, Any]]:
    """The summaries of the runs that have ended, by name."""
    return {
        name: summary
        for name, own in located.items()
        if (summary := read_summary(own.path)) and has_adapter(own.path) and not own.changes
    }


def _prepared(
    configs: Mapping[str, RunConfig], located: Mapping[str, Any], record: Record, log_fn: Callable[[str], None]
) -> list[Job]:
    """The jobs with everything loaded and checked; nothing is written.

    Those that have ended are among them: with them, the programs are those of the time before, to the bit.
    """
    base, made = load_base(next(iter(configs.values()))), []
    for name, config in configs.items():
        try:
            require_installed(config.trackers)
            step = resume_step(located[name], record.steps.get(name))
            say = partial(_say, log_fn, name)
            setup = prepare(config, located[name].path, say, resumes=step is not None, base=base)
            if step is not None and step > setup.config.steps:
                raise InputError(f"{setup.directory} has done {step} steps, more than steps={setup.config.steps}")
        except InputError as error:
            raise InputError(f"jobs.{name}: {error}") from None
        made.append(Job(name, located[name], setup, step, say))
    require_together([job.name for job in made], [job.setup for job in made])
    return made


def _say(log_fn: Callable[[str], None], name: str, text: str) -> None:
    log_fn(f"{name}: {text}")


@dataclass
class _Course:
    """Jobs that wait, train, and end."""

    config: JobsConfig
    jobs: list[Job]
    record: Record
    log_fn: Callable[[str], None]
    active: dict[int, Job] = field(default_factory=dict)
    ended: dict[int, TrainState] = field(default_factory=dict)  # the last state of active jobs that have ended
    failed: list[int] = field(default_factory=list)  # active jobs that have failed
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # summaries

    def run(self, ended: Collection[str]) -> dict[str, dict[str, Any]]:
        """Train until no job is left beside those that have ``ended`` before; the summaries by name."""
        setups = [job.setup for job in self.jobs]
        rounds = Rounds(setups, kinds_of(setups, self.config.at_once), self.config.at_once, self.config.tokens)
        waiting = [(i, job) for i, job in enumerate(self.jobs) if job.name not in ended]
        total = sum(job.setup.config.steps - (job.first or 0) for _, job in waiting)
        progress = open_progress(0, total, hidden=not is_primary())
        with catch_signals() as received:
            try:
                while waiting or self.active:
                    while waiting and len(self.active) < self.config.at_once:
                        self._begin(rounds, *waiting.pop(0), received)
                    if self.active:
                        progress.update(len(self.active))
                        self._round(rounds)
            finally:
                progress.close()
                for job in self.active.values():
                    job.close()
        return self.done

    def _begin(self, rounds: Rounds, i: int, job: Job, received: Callable[[], int]) -> None:
        state = job.start()
        rounds.place(i, state)
        self.active[i] = job
        committed = lambda: self.record.steps.get(job.name)  # noqa: E731
        stopped = self._guarded(i, lambda: job.open(partial(rounds.taken, i), received, committed))
        if stopped:
            self._stop(stopped, [other for other in self.active if other != i])
        self._end(rounds)

    def _round(self, rounds: Rounds) -> None:
        """A step of every active job; then, where it is time, a checkpoint of all and the record."""
        self.record.round += 1
        every = min(job.setup.config.checkpoint_every for job in self.active.values())
        ending = any(job.number + 1 == job.setup.config.steps for job in self.active.values())
        save = ending or self.record.round % every == 0
        results = rounds.step({i: job.number for i, job in self.active.items()}, save)
        came = {i: self._guarded(i, partial(job.send, results[i])) for i, job in list(self.active.items())}
        if stopped := next(filter(None, came.values()), None):
            self._stop(stopped, [i for i, error in came.items() if error is None])
        if save:
            self._commit()
        self._end(rounds)

    def _stop(self, stopped: Interrupted, going: list[int]) -> None:
        """Save the jobs that had gone on before the signal came, too, and end."""
        for i in going:
            if i not in self.ended and i not in self.failed:
                self._guarded(i, partial(self.active[i].send, None))
        self._commit()
        name = signal.Signals(stopped.signum).name
        raise Interrupted(stopped.signum, f"{name}: all jobs are saved, and the same command goes on from there")

    def _guarded(self, i: int, act: Callable[[], None]) -> Interrupted | None:
        """Do it, and note whether the job ends or fails; a signal is returned."""
        job = self.active[i]
        try:
            act()
        except StopIteration as end:
            self.ended[i], job.number = end.value, int(end.value.step)
        except RunError as error:
            self._failed(i, error)
        except Interrupted as error:
            job.number = max(checkpoint.steps(job.manager))
            return error
        return None

    def _end(self, rounds: Rounds) -> None:
        """Finish the jobs that have ended; they and those that have failed leave their slots."""
        for i, state in self.ended.items():
            try:
                self.done[self.active[i].name] = self.active[i].finish(state)
            except RunError as error:
                self._failed(i, error)
        if self.failed and is_primary():
            self.record.write()
        for i in {*self.ended, *self.failed}:
            rounds.free(i)
            self.active.pop(i).close()
        self.ended.clear()
        self.failed.clear()

    def _failed(self, i: int, error: RunError) -> None:
        job = self.active[i]
        self.record.failed[job.name] = str(error)
        self.failed.append(i)
        self.log_fn(f"{job.name} failed: {error}")

    def _commit(self) -> None:
        """Once all jobs have saved the round, say so."""
        left = [job for i, job in self.active.items() if i not in self.failed]
        if all(job.saved() for job in left):
            self.record.steps = {job.name: job.number for job in left}
        if is_primary():
            self.record.write()
