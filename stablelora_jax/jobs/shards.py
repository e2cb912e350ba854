"""Shards of a sweep: some of its points, with a record and a log of their own in ``OUTPUT/shards/<digest>``."""

from __future__ import annotations

import hashlib
import math
import os
import socket
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs.file import RECORD, JobsConfig, Record, read_record
from stablelora_jax.jobs.run import train_jobs
from stablelora_jax.runs.files import is_run
from stablelora_jax.utils.errors import InputError, Interrupted, RunError

SHARDS, LOG = "shards", "log.txt"
Outcome = tuple[dict[str, dict[str, Any]], dict[str, str]]  # summaries and failures by name


def divide(names: Sequence[str], workers: int, at_once: int) -> list[list[str]]:
    """``names`` in parts of nearly one size, at most ``at_once``, as many for each worker.

    Example::

      >>> divide("abcdefg", workers=2, at_once=2)
      [['a'], ['b', 'c'], ['d', 'e'], ['f', 'g']]
    """
    count = min(len(names), workers * math.ceil(len(names) / (workers * at_once)))
    cuts = [i * len(names) // count for i in range(count + 1)]
    return [list(names[start:end]) for start, end in zip(cuts, cuts[1:], strict=False)]


def digest(names: Sequence[str]) -> str:
    """The name of a shard's directory."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def gather(output: Path, names: Iterable[str], keep: Iterable[str] = ()) -> Record:
    """The record of ``output`` with the failures that all shards have recorded.

    Records of shards not in ``keep`` that know steps of ``names`` are removed: these points go on elsewhere. A failed
    point whose run directory has been removed is forgotten.
    """
    record, names = read_record(output), set(names)
    for path in sorted((output / SHARDS).glob(f"*/{RECORD}")):
        own = read_record(path.parent)
        record.failed |= own.failed
        if path.parent.name not in keep and names & own.steps.keys():
            path.unlink()
    record.failed = {name: why for name, why in record.failed.items() if is_run(output / name)}
    return record


def train_shard(jobs: JobsConfig, configs: Mapping[str, RunConfig], directory: str) -> Outcome | InputError | RunError:
    """In a worker: ``train_jobs``, from the driver's working directory. An error that is one line is the result."""
    try:
        os.chdir(directory)
        with (Path(jobs.output) / LOG).open("a") as file:

            def say(text: str) -> None:
                print(text, file=file, flush=True)

            say(f"process {os.getpid()} on {socket.gethostname()}")
            try:
                return train_jobs(jobs, configs, say)
            except (InputError, RunError, Interrupted) as error:
                return error if not isinstance(error, Interrupted) else RunError(str(error))
            except Exception:
                say(traceback.format_exc())
                raise
    except FileNotFoundError as error:
        host = socket.gethostname()
        return InputError(f"ray: {error.filename} is not there on {host}: all workers need the driver's file system")
