"""Orbax, the paths it takes, and what its errors mean."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

from stablelora_jax.utils.errors import InputError, RunError, brief
from stablelora_jax.utils.files import as_path

T = TypeVar("T")
Where = Any  # an Orbax CheckpointManager, or str | os.PathLike[str]


def orbax() -> Any:
    """The package, which says what goes wrong by exceptions only."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_audible)
    return ocp


def _audible(record: logging.LogRecord) -> bool:
    """Whether a record is not of Orbax, which logs tracebacks of threads, or somebody has asked for such."""
    from absl import logging as absl_logging

    return absl_logging.get_verbosity() >= absl_logging.INFO or f"{os.sep}orbax{os.sep}" not in record.pathname


def attempt(act: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of ``act`` and None; or None and the reason why Orbax could not do it."""
    try:
        return act(), None
    except (InputError, RunError):
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        return None, reason_of(error)


def is_manager(where: Where) -> bool:
    """Whether it is not a directory."""
    return hasattr(where, "wait_until_finished")


def path_of(where: Where) -> Any:
    """The directory, absolute."""
    from etils import epath

    if is_manager(where):
        return where.directory
    if isinstance(where, str | os.PathLike) and "://" in os.fspath(where):
        return epath.Path(where)
    return epath.Path(as_path(where, "the directory of checkpoints")).absolute()


def reason_of(error: BaseException) -> str:
    """What the operating system says, where it is the cause, else what Orbax or TensorStore says."""
    known = ("ENOSPC", "EROFS", "EACCES", "EDQUOT", "EIO", "ENOENT", "ENOTDIR", "EISDIR")
    texts = [os.strerror(getattr(errno, name)) for name in known]
    said = [text for text in texts if text in str(error)]
    return getattr(error, "strerror", None) or (said or [brief(error)])[0] or type(error).__name__
