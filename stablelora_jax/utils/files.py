"""Paths as users give them, files that are written whole or not at all, and JSON that is read with its mistakes named.

Whatever is new is written under a unique temporary name beside its place and then put there. :func:`write_new` puts it
only where nothing is; :func:`write_whole` replaces a regular file, so its caller makes sure that the file is ours. A
link, a pipe or a device is never replaced.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablelora_jax.utils.errors import InputError, RunError, brief

PARTIAL = re.compile(r"\.stablelora_jax-[0-9a-f]{16}\.partial")  # what a killed process may leave


def as_path(value: Any, name: str = "the path") -> Path:
    """``value`` (a string or ``os.PathLike``) as a path, with ``~`` expanded; nothing need be there.

    Raises:
      InputError: another type, an empty string, or what no file system takes; ``name`` stands first in the message.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(f"{name} must be a string or a path, not {value!r:.60}")
    if not os.fspath(value):
        raise InputError(f"{name} is empty")
    try:
        path = Path(value).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a loop of links; a NUL; no such user
        reason = getattr(error, "strerror", None) or brief(error)
        raise InputError(f"{name} {os.fspath(value)!r:.80} cannot be used: {reason}") from None
    return path


def partial_name(path: Path) -> Path:
    """A unique temporary name beside ``path``, short enough for any file system."""
    return path.with_name(f".stablelora_jax-{secrets.token_hex(8)}.partial")


def write_whole(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8) at ``path`` in one step: a reader, or a crash, sees the old file or the new one.

    Raises:
      InputError: something that is no regular file is there.
      OSError: it cannot be written; nothing has changed.
    """
    write_bytes_whole(path, text.encode())


def write_bytes_whole(path: Path, content: bytes) -> None:
    """:func:`write_whole` for bytes."""
    write_parts_whole(path, (content,))


def write_parts_whole(path: Path, parts: Iterable[bytes]) -> None:
    """:func:`write_whole` for bytes that come in parts; ``path`` itself may be read for them."""
    path = Path(path)
    require_replaceable(path)
    with _written(path, parts) as partial:
        os.replace(partial, path)


def write_new(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``, where nothing is.

    Raises:
      InputError: something is there.
      OSError: it cannot be written; nothing has changed.
    """
    with _written(path, (content,)) as partial:
        put_new(partial, path)


def put_new(partial: Path, path: Path) -> None:
    """Move the file or directory ``partial`` to ``path``, where nothing is; an empty directory may be.

    Raises:
      InputError: something is there; it stays as it is.
      OSError: it cannot be moved.
    """
    try:
        if partial.is_dir():
            os.rename(partial, path)  # which replaces nothing but an empty directory
            return
        os.link(partial, path)  # which, unlike rename, never replaces
        os.unlink(partial)
    except OSError as error:
        if os.path.lexists(path):
            raise InputError(f"{path} exists already: remove it or choose another name") from None
        if partial.is_dir() or error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        os.rename(partial, path)  # a file system without hard links


def require_replaceable(path: Path) -> None:
    """Check that ``path`` is a regular file, or nothing.

    Raises:
      InputError: a directory, a link, a pipe, a device or a socket is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is {kind_of(mode)} and is not replaced: move it, or choose another name")


def kind_of(mode: int) -> str:
    """What ``st_mode`` says, in words."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a directory",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a block device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


@contextmanager
def _written(path: Path, parts: Iterable[bytes]) -> Iterator[Path]:
    """A temporary file that holds ``parts``, on the disk; removed where nobody has moved it."""
    partial = partial_name(Path(path))
    try:
        with partial.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` (a full disk, a directory that is gone) into a :class:`RunError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or brief(error)
        raise RunError(f"cannot write {path}: {reason}; once that is mended, the same command goes on") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The JSON object that the file holds.

    Raises:
      InputError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise OSError("it is no regular file")
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or brief(error)
        raise InputError(f"{path} is not readable JSON: {reason}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
