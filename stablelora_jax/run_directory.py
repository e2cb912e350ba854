"""The directory of a run: made once, gone on with by the same configuration alone, written by one run at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from stablelora_jax import config
from stablelora_jax.checkpoint.wording import differences
from stablelora_jax.errors import InputError, RunError
from stablelora_jax.files import read_json_object, write_whole
from stablelora_jax.run_config import RunConfig

CONFIG, METRICS, SUMMARY, LOCK = "config.yaml", "metrics.jsonl", "summary.json", ".lock"
ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
# where and how a run is computed, watched and kept: its result is the same up to rounding
FREE = (
    ("output", "parallel", "distributed", "accumulate", "accept_changes", "trackers", "show")
    + ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")
)  # fmt: skip
FREE_OF_MODEL = ("remat", "attention")


def locate(run_config: RunConfig) -> Path:
    """The run's directory: free to be made, or made by the same configuration. Writes nothing.

    Raises:
      InputError: the directory holds another run (and ``accept_changes`` is off) or other files, or cannot be made.
    """
    directory = Path(run_config.output or default_directory(run_config))
    _require_usable(directory)
    changes = changed(directory, run_config)
    if changes and not run_config.accept_changes:
        shown = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
        raise InputError(
            f"{directory} holds a run with another configuration ({shown}): choose another output=, "
            "or go on with accept_changes=true"
        )
    if not (directory / CONFIG).is_file() and directory.exists() and not _is_free(directory):
        raise InputError(f"{directory} exists and is no run directory: choose another output=")
    return directory


def changed(directory: Path, run_config: RunConfig) -> list[str]:
    """What decides the result and is not as the run in ``directory`` has it; nothing where there is none."""
    if not (directory / CONFIG).is_file():
        return []
    try:
        theirs = identity(config.load(RunConfig, directory / CONFIG))
    except InputError as error:
        raise InputError(f"{error}; put back what it was, or choose another output=") from None
    return differences(theirs, identity(run_config), _shown)


def create(directory: Path, run_config: RunConfig, steps: int = 0) -> None:
    """Write the resolved configuration into the directory, which is made where it is not there.

    A configuration that is there and differs stays as ``config-until-<steps>.yaml``; with it, of a finished run, its
    summary and its adapter.

    Raises:
      InputError: it cannot be written.
      RunError: the disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if changed(directory, run_config):
            write_whole(_unused(directory, Path(CONFIG), steps), (directory / CONFIG).read_text())
            for name in (SUMMARY, ADAPTER):
                if (directory / name).exists():
                    os.rename(directory / name, _unused(directory, Path(name), steps))
        text = config.dump(run_config)
        if not (directory / CONFIG).is_file() or (directory / CONFIG).read_text() != text:
            write_whole(directory / CONFIG, text)
    except OSError as error:
        raise _unwritable(directory, error) from None


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the directory, which is made where it is not there; the lock goes with the process, however that ends.

    Raises:
      InputError: another process holds it, or it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a+")
    except OSError as error:
        raise _unwritable(directory, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise InputError(
                f"{directory} is being written by {holder}: wait for it or choose another output="
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        with suppress(OSError):  # a full disk, where what is in the file cannot be said
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def default_directory(run_config: RunConfig) -> str:
    """``runs/<task>-<digest>``: the digest is of what decides the result, so other values are another directory."""
    digest = hashlib.sha256(json.dumps(identity(run_config), sort_keys=True).encode()).hexdigest()
    return f"runs/{run_config.task.name}-{digest[:8]}"


def read_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None.

    Raises:
      InputError: it is damaged.
    """
    path = directory / SUMMARY
    try:
        return read_json_object(path) if path.is_file() else None
    except InputError as error:
        raise InputError(f"{error}: remove it, and the same command writes it again") from None


def identity(run_config: RunConfig) -> dict[str, Any]:
    """What decides the result: every key but :data:`FREE`; patterns as lists, since their order is meaning."""
    data, model = replace(run_config.data, cache=None), config.to_dict(run_config.model)
    plain = {key: own for key, own in config.to_dict(replace(run_config, data=data)).items() if key not in FREE}
    quantized = model["quantize"] is not None  # runs from before there was this key go on
    plain["model"] = {k: own for k, own in model.items() if k not in FREE_OF_MODEL and (k != "quantize" or quantized)}
    lora = plain["lora"]
    lists = {name: [[key, value] for key, value in lora[name].items()] for name in ("rank_pattern", "alpha_pattern")}
    return {**plain, "lora": {**lora, **lists, "alpha": float(lora["alpha"])}}


def has_adapter(directory: Path) -> bool:
    """Whether a whole adapter lies in the run's directory."""
    return (directory / ADAPTER / "adapter_config.json").is_file()


def _unwritable(directory: Path, error: OSError) -> InputError | RunError:
    kind = RunError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
    return kind(f"cannot write to {directory}: {error.strerror or error}")


def _require_usable(directory: Path) -> None:
    """Whether it, or the nearest directory above it that is there, can be read and written."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(directory / CONFIG)
    except (OSError, ValueError) as error:  # a name that is too long, or no name at all; a directory that is closed
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {directory}: {reason}: choose another output=") from None
    parent = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    usable = parent.is_dir() and os.access(parent, os.R_OK | os.W_OK | os.X_OK)
    if not usable and (parent.is_dir() or parent != directory.absolute()):
        raise InputError(f"cannot write to {directory}: {parent} is no directory that can be written to")


def _is_free(directory: Path) -> bool:
    left = {LOCK, f".{CONFIG}.partial"}  # by a run that was killed at its beginning
    return directory.is_dir() and not {path.name for path in directory.iterdir()} - left


def _unused(directory: Path, name: Path, steps: int) -> Path:
    names = (directory / f"{name.stem}-until-{steps}{f'-{i}' * (i > 0)}{name.suffix}" for i in range(1000))
    return next(path for path in names if not path.exists())


def _shown(there: Any, here: Any) -> tuple[str, str]:
    """Both as text."""
    return tuple("absent" if x is ... else str(x) for x in (there, here))  # type: ignore[return-value]
