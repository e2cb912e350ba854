"""Which entries of a directory are checkpoints of ours: those alone are counted, listed, restored and removed.

A checkpoint has a plain decimal name and holds our record, ``about/metadata``. Where that is missing and nothing but
parts of a checkpoint are there, it is a damaged one, which is reported and left alone. All else is somebody else's.
"""

from __future__ import annotations

import os
import re
import shutil
from typing import Any, Literal

from stablelora_jax.utils.errors import InputError

NAME = re.compile(r"0|[1-9][0-9]*")
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what Orbax is writing
PARTS = {"about", "state", "_CHECKPOINT_METADATA", "commit_success.txt"}

Kind = Literal["whole", "damaged", "foreign"]


def kind_of(path: Any) -> Kind:
    """What the directory ``path`` is; a link is foreign, whatever it leads to.

    Raises:
      InputError: it cannot be read.
    """
    try:
        if (path / "about" / "metadata").is_file() and not _is_link(path):
            return "whole"
        return "damaged" if _holds_parts_only(path) else "foreign"
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from None


def candidates(path: Any) -> dict[int, Any]:
    """The directories in ``path`` that are called like a step, by step."""
    return {int(p.name): p for p in path.iterdir() if NAME.fullmatch(p.name) and p.is_dir()}


def require_own(path: Any) -> None:
    """Refuse a directory in which Orbax would take something for a checkpoint that is none of ours.

    Raises:
      InputError: naming it.
    """
    if not path.exists():
        return
    for entry in sorted(path.iterdir()):
        step, _, rest = entry.name.partition(TEMPORARY)
        named = NAME.fullmatch(step) and (rest or entry.name == step or entry.name.endswith(TEMPORARY))
        if named and entry.is_dir() and kind_of(entry) == "foreign":
            raise InputError(f"{entry} is no checkpoint of stablelora_jax: move it, or keep checkpoints elsewhere")


def remove_half_written(path: Any) -> None:
    """Remove what a killed process was writing: temporary directories with parts of a checkpoint and nothing else."""
    for entry in path.iterdir() if path.exists() else ():
        step, _, _ = entry.name.partition(TEMPORARY)
        if step != entry.name and NAME.fullmatch(step) and entry.is_dir() and _holds_parts_only(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _holds_parts_only(path: Any) -> bool:
    if _is_link(path) or not path.is_dir():
        return False
    return {entry.name.partition(TEMPORARY)[0] for entry in path.iterdir()} <= PARTS


def _is_link(path: Any) -> bool:
    return "://" not in str(path) and os.path.islink(path)
