"""The rows of a suite on disk: one JSON file per row, written atomically, never overwritten unless asked."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import PARTIAL, read_json_object, write_new, write_whole

MARK = "suite.json"
FOLDERS = ("rows", "logs")


@contextmanager
def opened(output: Path, rehearsal: bool) -> Iterator[Path]:
    """Open the directory of a suite under an exclusive lock; it is created if it does not exist.

    Raises:
      InputError: the directory has other content, or rows of the other kind (real or rehearsal), or is locked.
    """
    _make(output, rehearsal)
    if read_json_object(output / MARK).get("rehearsal") is not rehearsal:
        kind = "real rows" if rehearsal else "rows of a rehearsal"
        raise InputError(f"--output {output} contains {kind}: choose another")
    with (output / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--output {output} is in use by another process: wait for it to finish") from None
        yield output


def _make(output: Path, rehearsal: bool) -> None:
    """Create the directory with its marker file and sub-directories, unless it has other content."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is not a directory: choose another")
    mark = output / MARK
    if not mark.exists() and output.is_dir() and not all(PARTIAL.fullmatch(path.name) for path in output.iterdir()):
        raise InputError(f"--output {output} is not empty and not from bench.py gpu: choose another")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not mark.exists():  # written first, so that a directory of an interrupted call is recognised
            write_new(mark, json.dumps({"made_by": "bench.py gpu", "rehearsal": rehearsal}).encode())
        for folder in FOLDERS:
            (output / folder).mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}") from None


def read(output: Path) -> dict[str, dict[str, Any]]:
    """All rows so far, by name.

    Raises:
      InputError: a file is not a valid row.
    """
    return {path.stem: _row(path) for path in sorted((output / "rows").glob("*.json"))}


def _row(path: Path) -> dict[str, Any]:
    try:
        found = read_json_object(path)
    except InputError as error:
        raise InputError(f"{error}: remove it to measure it again") from None
    if found.get("name") != path.stem or "status" not in found:
        raise InputError(f"{path} is not a row of bench.py gpu: remove it")
    return found


def write(output: Path, row: dict[str, Any], again: bool = False) -> None:
    """Write a row; with ``again``, replace an existing one."""
    text = json.dumps(row, indent=1, default=float) + "\n"
    path = output / "rows" / f"{row['name']}.json"
    if again:
        write_whole(path, text)
    else:
        write_new(path, text.encode())
