"""Files that are written whole or not at all, and JSON that is read with its mistakes named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablelora_jax.errors import InputError, RunError, brief


def write_whole(path: Path, text: str) -> None:
    """Put ``text`` (UTF-8) at ``path`` in one step: a reader, or a crash, sees the old file or the new one."""
    write_bytes_whole(path, text.encode())


def write_bytes_whole(path: Path, content: bytes) -> None:
    """:func:`write_whole` for bytes."""
    write_parts_whole(path, (content,))


def write_parts_whole(path: Path, parts: Iterable[bytes]) -> None:
    """:func:`write_whole` for bytes that come in parts; ``path`` itself may be read for them."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


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
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or brief(error)
        raise InputError(f"{path} is not readable JSON: {reason}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
