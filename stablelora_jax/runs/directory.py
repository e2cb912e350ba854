"""The directory of a run: made once, resumed by the same configuration alone, written by one run at a time.

What a run writes, and how it is told from a user's own files, is in :mod:`stablelora_jax.runs.files`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from stablelora_jax import config
from stablelora_jax.config.run import RunConfig, takes_template
from stablelora_jax.lora.initializers import CALIBRATED
from stablelora_jax.runs.files import (
    ADAPTER,
    CONFIG,
    LOCK,
    MARK,
    METRICS,
    SUMMARY,
    config_text,
    is_commented,
    is_lock,
    require_ours,
)
from stablelora_jax.training.checkpoint.wording import differences
from stablelora_jax.utils.errors import InputError, RunError
from stablelora_jax.utils.files import PARTIAL, as_path, read_json_object, write_new, write_whole
from stablelora_jax.utils.outputs import require_writable

# keys that leave the result of a run the same up to rounding
RESULT_INVARIANT_KEYS = (
    ("output", "parallel", "distributed", "gradient_accumulation_steps", "accept_changes", "trackers")
    + ("num_samples",)
    + ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")
)  # fmt: skip
FREE_OF_MODEL = ("remat", "attention")


class RunDirectory(NamedTuple):
    """A run's directory as :func:`locate` found it."""

    path: Path
    config_text: str  # of its config.yaml; empty where there is none
    changes: list[str]  # the keys that decide the result and differ from its config.yaml, as text


def locate(run_config: RunConfig) -> RunDirectory:
    """The run's directory: free to be made, or made by the same configuration. Writes nothing.

    Raises:
      InputError: the directory holds another run (and ``accept_changes`` is off) or other files, or cannot be made.
    """
    try:
        directory = as_path(run_config.output or default_directory(run_config), "output")
    except InputError as error:
        raise InputError(f"{error}: choose another output=") from None
    _require_usable(directory)
    require_ours(directory)
    text = config_text(directory)
    changes = _changes(directory, run_config)
    if changes and not run_config.accept_changes:
        shown = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
        raise InputError(
            f"{directory} holds a run with another configuration ({shown}): choose another output=, "
            "or go on with accept_changes=true"
        )
    return RunDirectory(directory, text, changes)


def _changes(directory: Path, run_config: RunConfig) -> list[str]:
    """The keys that decide the result and differ from the run in ``directory``; none where there is no run."""
    if not (directory / CONFIG).is_file():
        return []
    try:
        theirs = identity(config.load(RunConfig, directory / CONFIG, accept_old_names=True))
    except InputError as error:
        raise InputError(f"{error}; put back what it was, or choose another output=") from None
    return differences(theirs, identity(run_config), _shown)


def create(located: RunDirectory, run_config: RunConfig, steps: int = 0) -> None:
    """Write the resolved configuration into the directory, which is made where it does not exist.

    A ``config.yaml`` that differs or has comments is kept as ``config-until-<steps>.yaml``. Where it differs,
    ``metrics.jsonl``, ``summary.json`` and ``adapter/`` are kept under such names, too. Partial files of a killed run
    are removed.

    Raises:
      InputError: it cannot be written, or ``config.yaml`` has changed since :func:`locate`.
      RunError: the disk is full.
    """
    directory = located.path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        require_ours(directory)
        _remove_partial(directory)
        if config_text(directory) != located.config_text:
            raise InputError(f"another process has written to {directory} in the meantime: start again")
        if located.changes:
            for name in (CONFIG, METRICS):
                _keep_copy(directory, name, steps)
            for name in (SUMMARY, ADAPTER):
                if (directory / name).exists():
                    os.rename(directory / name, _unused(directory, Path(name), steps))
        elif is_commented(directory):
            _keep_copy(directory, CONFIG, steps)
        text = MARK + config.dump(run_config)
        if located.config_text != text:
            write_whole(directory / CONFIG, text)
    except OSError as error:
        raise _unwritable(directory, error) from None


def _remove_partial(directory: Path) -> None:
    for left in directory.iterdir():
        if PARTIAL.fullmatch(left.name) and not left.is_symlink():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _keep_copy(directory: Path, name: str, steps: int) -> None:
    if (directory / name).is_file():
        write_new(_unused(directory, Path(name), steps), (directory / name).read_bytes())


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the directory, which is made where it is not there; the lock goes with the process, however that ends.

    Raises:
      InputError: another process holds it, or it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not is_lock(directory / LOCK):
            raise InputError(f"{directory / LOCK} is not of a run: move it, or choose another output=")
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
    """The keys that decide the result: all but :data:`RESULT_INVARIANT_KEYS`; patterns as ordered lists."""
    data = replace(run_config.data, cache=None, chat_template=takes_template(run_config))
    model = config.to_dict(run_config.model)
    plain = {
        key: own
        for key, own in config.to_dict(replace(run_config, data=data)).items()
        if key not in RESULT_INVARIANT_KEYS
    }
    if run_config.lora.init not in CALIBRATED:  # which alone read it
        del plain["calibration_batches"]
    quantized = model["quantize"] is not None  # runs from before there was this key go on
    plain["model"] = {k: own for k, own in model.items() if k not in FREE_OF_MODEL and (k != "quantize" or quantized)}
    if plain["rank_allocation"] is None:  # likewise
        del plain["rank_allocation"]
    plain["optimizer"] = {k: own for k, own in plain["optimizer"].items() if (k, own) != ("stop_rule", True)}
    lora = plain["lora"]
    lists = {name: [[key, value] for key, value in lora[name].items()] for name in ("rank_pattern", "alpha_pattern")}
    return {**plain, "lora": {**lora, **lists, "alpha": float(lora["alpha"])}}


def _unwritable(directory: Path, error: OSError) -> InputError | RunError:
    kind = RunError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
    return kind(f"cannot write to {directory}: {error.strerror or error}")


def _require_usable(directory: Path) -> None:
    """Whether it, or where it is to be made, can be read and written."""
    if directory.is_symlink() and not directory.exists():
        raise InputError(f"{directory} is a symbolic link to nothing: choose another output=")
    try:
        there = directory.exists()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(directory / CONFIG)
    except OSError as error:  # a directory that is closed
        raise InputError(f"cannot write to {directory}: {error.strerror}: choose another output=") from None
    if not there:
        require_writable(directory, "output=")
    elif directory.is_dir() and not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {directory}: it is no directory that can be written to")


def _unused(directory: Path, name: Path, steps: int) -> Path:
    names = (directory / f"{name.stem}-until-{steps}{f'-{i}' * (i > 0)}{name.suffix}" for i in range(1000))
    return next(path for path in names if not os.path.lexists(path))


def _shown(there: Any, here: Any) -> tuple[str, str]:
    """Both as text."""
    return tuple("absent" if x is ... else str(x) for x in (there, here))  # type: ignore[return-value]
