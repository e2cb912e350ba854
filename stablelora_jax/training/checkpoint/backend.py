"""Orbax, the paths it takes, and what its errors mean."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from stablelora_jax.utils.errors import InputError, RunError, brief
from stablelora_jax.utils.files import as_path

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


def ignore_closed_loop_errors() -> None:
    """For good: where a write fails, those beside it end, at any time, after Orbax has closed their event loop."""
    hook = sys.unraisablehook
    if getattr(hook, "silent", False):
        return

    def quiet(found: Any) -> None:
        if "Event loop is closed" not in str(found.exc_value):
            hook(found)

    quiet.silent = True  # type: ignore[attr-defined]
    sys.unraisablehook = quiet


def attempt(act: Callable[[], Any]) -> tuple[Any, str | None]:
    """What ``act`` returns, and None; or None, and why Orbax could not do it.

    Where one read or write fails, those beside it may end with an error that nobody asks for, which Python would show
    as a traceback at any later time. They are waited for and let go.
    """
    ignore_closed_loop_errors()
    log = logging.getLogger("asyncio")
    retrieved = lambda record: "never retrieved" not in record.getMessage()  # noqa: E731
    log.addFilter(retrieved)
    try:
        try:
            return act(), None
        except (InputError, RunError):
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = reason_of(error)
        time.sleep(0.1)
        gc.collect()
        return None, reason
    finally:
        log.removeFilter(retrieved)


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
