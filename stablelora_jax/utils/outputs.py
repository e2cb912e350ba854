"""What a command's ``--output`` names: made sure of before the work, whole after it, and never replacing anything.

A new file or directory appears at the end, or not at all. What is there already is refused, but for a pipe or a
character device: these are written into. Everything that cannot be written is found when the context is entered.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from stablelora_jax.utils.errors import InputError, RunError, brief
from stablelora_jax.utils.files import as_path, kind_of, partial_name, put_new

PATIENCE = 5.0  # seconds that a pipe may be without a reader


def require_new(path: Any, name: str = "--output") -> Path:
    """``path`` with ``~`` expanded, where nothing is and something can be made; leaves nothing behind.

    Raises:
      InputError: something is there, a dangling link too, or nothing can be made there.
    """
    out = as_path(path, name)
    out = out.resolve() if ".." in out.parts else out  # a directory that is made must not come to lie on the way
    _require_absent(out, name)
    require_writable(out, name)
    return out


def require_writable(path: Path, name: str) -> None:
    """Check that something can be made at ``path``, by making a directory where the nearest one above it is there.

    Raises:
      InputError: that is no directory, or it cannot be written to.
    """
    there = next((p for p in path.absolute().parents if os.path.lexists(p)), Path("/"))
    if not there.is_dir():
        raise InputError(
            f"cannot write to {path}: {there} is no directory that can be written to: choose another {name}"
        )
    trial = partial_name(there / "x")
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {_reason(error)}: choose another {name}") from None


@contextmanager
def new_directory(path: Any, name: str = "--output") -> Iterator[Path]:
    """A temporary directory to fill, which becomes ``path`` at the end; where the body raises, it is removed.

    Raises:
      InputError: as :func:`require_new`; or somebody else has made ``path`` in the meantime.
    """
    out = require_new(path, name)
    with _beside(out) as partial:
        with _named(out):
            partial.mkdir()
        yield partial
        with _named(out):
            put_new(partial, out)


@contextmanager
def new_file(path: Any, name: str = "--output") -> Iterator[Path]:
    """The name of a temporary file to write, which becomes ``path`` at the end; otherwise as :func:`new_directory`."""
    out = require_new(path, name)
    with _beside(out) as partial:
        yield partial
        with _named(out):
            put_new(partial, out)


@contextmanager
def open_output(path: Any, name: str = "--output") -> Iterator[TextIO]:
    """A UTF-8 text stream to ``path``: a new file, there whole at the end, or a pipe or a device that is there.

    What is the process's own standard output or error (``/dev/stdout``) is written to as that.

    Raises:
      InputError: a file, directory, link to one, or block device is there; a pipe that nobody reads from.
      RunError: the reader of a pipe has gone.
    """
    out = as_path(path, name)
    mode = _mode(out)
    if mode is None or not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or _own_stream(out)):
        with new_file(out, name) as partial, partial.open("x", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        return
    with _stream(out) as stream:
        try:
            yield stream
            stream.flush()
        except BrokenPipeError:
            raise RunError(f"{out}: its reader has gone") from None


def _require_absent(out: Path, name: str) -> None:
    if not os.path.lexists(out):
        return
    mode = os.lstat(out).st_mode
    kind = "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else f", as {kind_of(mode)}"
    nothing = " to nothing" if stat.S_ISLNK(mode) and not out.exists() else ""
    raise InputError(f"{out} exists already{kind}{nothing}: remove it or choose another {name}")


def _mode(out: Path) -> int | None:
    """``st_mode`` of what ``out`` leads to; None where there is nothing."""
    try:
        return os.stat(out).st_mode
    except OSError:
        return None


def _own_stream(out: Path) -> Any:
    """The standard stream that ``out`` leads to, or None."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError):
            if stream is not None and os.path.samestat(os.stat(out), os.fstat(number)):
                return stream
    return None


@contextmanager
def _stream(out: Path) -> Iterator[TextIO]:
    """What is there, opened for writing: neither made nor cut."""
    if own := _own_stream(out):
        yield own
        return
    with open(_opened(out), "w", encoding="utf-8") as stream:
        yield stream


def _opened(out: Path) -> int:
    """A file descriptor; of a pipe once somebody reads from it."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            found = os.open(out, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            os.set_blocking(found, True)
            return found
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > end:
                reason = "nobody reads from it" if error.errno == errno.ENXIO else _reason(error)
                raise InputError(f"cannot write {out}: {reason}") from None
        time.sleep(0.05)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A temporary name beside ``out``, whose directory is made; what is left of either at the end is removed."""
    made = [p for p in out.absolute().parents if not p.exists()]
    partial = partial_name(out)
    try:
        with _named(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        if not os.path.lexists(out):
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()


@contextmanager
def _named(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {out}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return error.strerror or brief(error)
