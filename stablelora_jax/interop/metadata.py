"""``stablelora.json``: metadata that PEFT has no key for. It also marks directories that this package wrote."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, read_json_object, require_replaceable

OURS, WRITER = "stablelora.json", "stablelora_jax"


def load_metadata(directory: str | Path) -> dict[str, Any]:
    """The content of ``stablelora.json``, which includes the ``metadata`` of ``save_peft``; empty without such a file.

    Raises:
      InputError: the file is damaged.
    """
    path = as_path(directory, "the adapter's directory") / OURS
    return read_json_object(path) if path.is_file() else {}


def require_own(directory: Path, names: Sequence[str]) -> None:
    """Refuse a directory that holds one of the files ``names`` and was not written by this package.

    Raises:
      InputError: naming the file.
    """
    there = [name for name in names if os.path.lexists(directory / name)]
    for name in there:
        require_replaceable(directory / name)
    if there and (OURS not in there or load_metadata(directory).get("written_by") != WRITER):
        raise InputError(f"{directory / there[0]} was not written by {WRITER}: choose another directory")
