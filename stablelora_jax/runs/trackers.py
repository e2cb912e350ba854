"""Where a run's numbers go besides ``metrics.jsonl``: TensorBoard, and Weights & Biases or MLflow where asked for.

A tracker is two functions: ``write(step, numbers)`` and ``close()``. A run that is resumed goes on in the same W&B or
MLflow run, whose id stands in RUN/trackers.json, and each step is shown once: TensorBoard is told to forget what came
after the resumed step, to the others nothing is sent again. They are set up by their own environment variables
(``WANDB_PROJECT``, ``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``); the configuration goes with
the run. A service that fails while training is left out with one line on stderr: ``metrics.jsonl`` has everything.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stablelora_jax.runs.files import CONFIG
from stablelora_jax.utils.errors import InputError, RunError, brief
from stablelora_jax.utils.files import read_json_object, write_whole, writing

IDS = "trackers.json"  # in a run directory: the id of its run at each service
PROJECT = "stablelora_jax"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise


class Tracker(NamedTuple):
    """Takes numbers such as ``{"train/loss": 1.5}`` at a step."""

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def require_installed(names: Iterable[str]) -> None:
    """Import what the trackers need.

    Raises:
      InputError: a name that is none, or a package that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"there is no tracker {name!r}; there are {', '.join(TRACKERS)}")
        package, needed = NEEDS[name]
        try:
            found = hasattr(importlib.import_module(package), needed)
        except ImportError:
            found = False
        if not found:  # a mere folder called wandb or mlflow can be imported, too
            raise InputError(f"trackers: {name} is not installed: pip install {package}, or leave it out")


def open_trackers(directory: Path, names: Iterable[str], step: int) -> list[Tracker]:
    """The trackers of a run that has done ``step`` steps.

    Raises:
      InputError: one is not installed or cannot be reached.
      RunError: the run directory cannot be written.
    """
    names = tuple(names)
    require_installed(names)
    opened = []
    for name in names:
        try:
            tracker = TRACKERS[name](directory, step)
        except (InputError, RunError):
            raise
        except Exception as error:  # whatever the service's client raises
            raise InputError(f"trackers: {name} cannot start: {brief(error)}") from None
        opened.append(_forgiving(name, tracker))
    return opened


def settings(directory: Path) -> dict[str, Any]:
    """The configuration of a run by dotted key, such as ``{"lora.rank": 8}``; none without a ``config.yaml``.

    Raises:
      InputError: it cannot be read or is not YAML of keys.
    """
    path = directory / CONFIG
    if not path.is_file():
        return {}
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {brief(error)}") from None
    if not isinstance(plain, dict):
        raise InputError(f"{path} does not hold keys")
    return dotted(plain)


def dotted(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones: ``{"lora": {"rank": 8}}`` as ``{"lora.rank": 8}``."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _forgiving(name: str, tracker: Tracker) -> Tracker:
    """The tracker, silent after its first failure; a run directory that cannot be written is no such failure."""
    broken: list[str] = []

    def call(work: Callable[..., None], *arguments: Any) -> None:
        if broken:
            return
        try:
            work(*arguments)
        except RunError:
            raise
        except Exception as error:  # whatever the service's client raises
            broken.append(brief(error))
            print(f"warning: {name} is left out from here on: {broken[0]}", file=sys.stderr)

    return Tracker(lambda step, numbers: call(tracker.write, step, numbers), lambda: call(tracker.close))


def _tensorboard(directory: Path, step: int) -> Tracker:
    """Event files, one a start; written at once and by this thread, so that a full disk ends the run in one line."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c

    path = directory / "tensorboard" / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"

    def add(**content: Any) -> None:
        data = Event(wall_time=time.time(), **content).SerializeToString()
        size = struct.pack("<Q", len(data))
        parts = (size, struct.pack("<I", masked_crc32c(size)), data, struct.pack("<I", masked_crc32c(data)))
        with writing(path), path.open("ab") as file:
            file.write(b"".join(parts))

    def write(step: int, numbers: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        add(step=step, summary=Summary(value=values))

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    add(file_version="brain.Event:2")
    add(step=step + 1, session_log=SessionLog(status=SessionLog.START))  # forget this step and those after it
    return Tracker(write, lambda: None)


def _wandb(directory: Path, step: int) -> Tracker:
    import wandb

    identity = _known(directory).get("wandb") or uuid.uuid4().hex[:12]
    _remember(directory, "wandb", identity)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        name=directory.name,
        id=identity,
        resume="allow",
        dir=str(directory),
        config=settings(directory),
        settings=wandb.Settings(console="off"),
    )

    def write(step: int, numbers: Mapping[str, float]) -> None:
        if step >= run.step:
            run.log(dict(numbers), step=step)

    return Tracker(write, run.finish)


def _mlflow(directory: Path, step: int) -> Tracker:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient()
    run_id = _known(directory).get("mlflow") or _new_mlflow_run(client, directory)
    client.update_run(run_id, status="RUNNING")
    keys = client.get_run(run_id).data.metrics
    sent = {key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in keys}

    def write(step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(run_id, [Metric(k, v, now, step) for k, v in numbers.items() if step > sent.get(k, -1)])

    return Tracker(write, lambda: client.set_terminated(run_id))


def _new_mlflow_run(client: Any, directory: Path) -> str:
    from mlflow.entities import Param

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else client.create_experiment(name)
    run_id: str = client.create_run(number, run_name=directory.name).info.run_id
    _remember(directory, "mlflow", run_id)
    params = [Param(key, str(value)[:500]) for key, value in settings(directory).items()]
    for first in range(0, len(params), 100):  # the service takes no more at once
        client.log_batch(run_id, params=params[first : first + 100])
    return run_id


def _known(directory: Path) -> dict[str, Any]:
    return read_json_object(directory / IDS) if (directory / IDS).is_file() else {}


def _remember(directory: Path, name: str, identity: str) -> None:
    with writing(directory / IDS):
        write_whole(directory / IDS, json.dumps(_known(directory) | {name: identity}) + "\n")


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
NEEDS = {  # the package and what it must have
    "tensorboard": ("tensorboardX", "SummaryWriter"),
    "wandb": ("wandb", "init"),
    "mlflow": ("mlflow", "MlflowClient"),
}
