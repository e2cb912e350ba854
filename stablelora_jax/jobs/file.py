"""``jobs.yaml``: the configurations of several jobs, and the record of how far they are.

::

    output: runs/ranks         # one run directory for each job, and jobs.json
    at_once: 8                 # jobs that are trained side by side; the others wait
    config: default            # a YAML file, or the name of one; null: all defaults
    common: {steps: 200, batch_size: 8}
    jobs:
      r4: {lora: {rank: 4, alpha: 8}}
      r8: {lora: {rank: 8}, optimizer: {name: adamw, learning_rate: 1e-4}}

Later ones win: the file ``config``, ``common``, the job's own keys, ``key=value`` of the command line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stablelora_jax import config
from stablelora_jax.config import Section, option
from stablelora_jax.config.keys import PositiveInt
from stablelora_jax.config.run import RunConfig
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import read_json_object, write_whole, writing

RECORD = "jobs.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,99}")


@dataclass(frozen=True)
class JobsConfig(Section):
    """Several jobs on one base."""

    output: str = option("runs/jobs", "directory of the jobs' run directories")
    at_once: PositiveInt = option(8, "number of jobs that are trained side by side; the others wait")
    tokens: PositiveInt | None = option(None, "tokens of a pass over the base; null: chosen from the first batches")
    config: str | None = option(None, "a YAML file or the name of a configuration; null: all defaults")
    common: Mapping[str, Any] = option({}, "keys of all jobs")
    jobs: Mapping[str, Mapping[str, Any]] = option({}, "the jobs by name: the keys of each")


def load_jobs(
    path: Path, overrides: Sequence[str] = (), find: Callable[[str], Any] = Path
) -> tuple[JobsConfig, dict[str, RunConfig]]:
    """The file, and the configuration of each job by name.

    Args:
      path: of the YAML file.
      overrides: ``key=value``, for all jobs.
      find: gives the file of a configuration from its name.

    Raises:
      InputError: no such file or key, or jobs of one name; one line.
    """
    jobs: JobsConfig = config.load(JobsConfig, path)
    if not jobs.jobs:
        raise InputError(f"{path}: jobs is empty: name at least one job with its keys")
    base = None if jobs.config is None else find(jobs.config)
    found = {}
    for name, own in jobs.jobs.items():
        if not NAME.fullmatch(name):
            raise InputError(f"{path}: jobs.{name!r:.80} is no name of a directory: use letters, digits and ._=,+-")
        if "output" in own:
            raise InputError(f"{path}: jobs.{name}.output: the run directory is {Path(jobs.output) / name}")
        try:
            given = [*as_overrides(jobs.common), *as_overrides(own or {}), *overrides]
            found[name] = config.load(RunConfig, base, [*given, f"output={Path(jobs.output) / name}"])
        except InputError as error:
            raise InputError(f"{path}: jobs.{name}: {error}") from None
    return jobs, found


def as_overrides(keys: Mapping[str, Any]) -> list[str]:
    """``key=value`` of each, the value as YAML."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**9).strip().removesuffix('...').strip()}"
        for key, value in keys.items()
    ]


@dataclass
class Record:
    """How far the jobs are: written when all of them have saved the same round."""

    path: Path
    round: int
    steps: dict[str, int]  # of the jobs under way at that round, by name
    failed: dict[str, str]  # why a job has ended without a result

    def write(self) -> None:
        """Replace the file, in one step.

        Raises:
          RunError: it cannot be written.
        """
        own = {"round": self.round, "steps": self.steps, "failed": self.failed}
        with writing(self.path):
            write_whole(self.path, json.dumps(own, indent=2) + "\n")


def read_record(output: Path) -> Record:
    """The record in the directory of the jobs; of round 0 where there is none.

    Raises:
      InputError: it is damaged, or no record of jobs.
    """
    path = output / RECORD
    if not path.is_file():
        return Record(path, 0, {}, {})
    own = read_json_object(path)
    try:
        steps = {str(name): int(step) for name, step in own["steps"].items()}
        failed = {str(name): str(why) for name, why in own["failed"].items()}
        return Record(path, int(own["round"]), steps, failed)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is no record of jobs: move it, or choose another output") from None
