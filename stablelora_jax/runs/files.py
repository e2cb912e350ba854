"""The files in a run's directory: their names, and how each is told from one that a user put there.

A directory is a run's where ``.lock`` names a process, or ``config.yaml`` begins with :data:`MARK` or is what a run
wrote before there was that line: every key and no comment.
``metrics.jsonl`` begins with what is trained on, a picture names this package as its software. Whatever else is found
where a run writes is a user's, and is refused by name before the work.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from stablelora_jax.config.run import RunConfig
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import PARTIAL

CONFIG, METRICS, SUMMARY, LOCK = "config.yaml", "metrics.jsonl", "summary.json", ".lock"
ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
PICTURES = ("loss.png", "norms.png", "stability.png")
MARK = "# stablelora_jax: the configuration of this run, as resolved\n"
PAGE = "<!doctype html>\n<!-- stablelora_jax: page of runs -->\n"  # how the page of a run begins
LOCKED = re.compile(rb"(process \d+ on [^\n]*)?")  # what a run writes into its lock, or has not yet
SOFTWARE = "stablelora_jax"  # in a picture of a run; before there was that, matplotlib's own name
RECORDED = re.compile(rb'\{"step": \d+, "data": \{')  # how the first record of a run begins


def require_ours(directory: Path) -> None:
    """Refuse a directory that holds what no run has written where a run writes."""
    if not directory.exists() or is_free(directory):
        return
    if not is_run(directory):
        what = f"; its {CONFIG} was not written by a run" if (directory / CONFIG).is_file() else ""
        raise InputError(f"{directory} exists and is no run directory{what}: choose another output=")
    own = {METRICS: is_log, SUMMARY: _is_regular, ADAPTER: _is_adapter, **dict.fromkeys(PICTURES, is_picture)}
    for name, known in own.items():
        if not known(directory / name):
            raise InputError(f"{directory / name} was not made by a run: move it, or choose another output=")


def is_run(directory: Path) -> bool:
    """Whether ``directory`` is of a run."""
    lock = directory / LOCK
    if not os.path.lexists(directory / CONFIG):
        return False
    if is_lock(lock) and os.path.lexists(lock) and lock.stat().st_size:
        return True
    text = config_text(directory)
    keys = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    names = {field.metadata.get("was") or field.name for field in fields(RunConfig)}  # from before there was MARK
    every = keys >= names or keys >= {field.name for field in fields(RunConfig)}
    return text.startswith(MARK) or (every and not is_commented(directory))


def is_commented(directory: Path) -> bool:
    """Whether somebody has written comments into the ``config.yaml`` that lies in ``directory``."""
    return re.search(r"(^|\s)#", config_text(directory).removeprefix(MARK)) is not None


def config_text(directory: Path) -> str:
    """The text of ``config.yaml``; empty where there is no regular file that can be read."""
    path = directory / CONFIG
    try:
        return path.read_text(encoding="utf-8") if stat.S_ISREG(os.lstat(path).st_mode) else ""
    except (OSError, ValueError):
        return ""


def has_adapter(directory: Path) -> bool:
    """Whether a whole adapter lies in the run's directory."""
    return (directory / ADAPTER / "adapter_config.json").is_file()


def is_free(directory: Path) -> bool:
    """Whether a run can begin there: an empty directory, or what a run left that was killed at its beginning."""
    if not directory.is_dir():
        return False
    left = [path for path in directory.iterdir() if not PARTIAL.fullmatch(path.name)]
    return all(path.name == LOCK and is_lock(path) for path in left)


def is_lock(path: Path) -> bool:
    """Whether it is the lock of a run, or nothing is there."""
    return _begins(path, lambda content: bool(LOCKED.fullmatch(content)))


def is_log(path: Path) -> bool:
    """Whether it is the log of a run, cut short at whatever place, or nothing is there."""
    whole = b'{"step": 0, "data": {'
    return _begins(path, lambda content: bool(RECORDED.match(content)) or whole.startswith(content))


def _begins(path: Path, known: Callable[[bytes], bool]) -> bool:
    """Whether nothing is at ``path``, or a regular file whose first 300 bytes are ``known``."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with path.open("rb") as file:
            return known(file.read(300))
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # what is closed is said where it is read
        return True


def _is_regular(path: Path) -> bool:
    return _begins(path, lambda content: True)


def _is_adapter(path: Path) -> bool:
    return not os.path.lexists(path) or has_adapter(path.parent)


def is_picture(path: Path) -> bool:
    """Whether it is a picture of a run, or nothing is there."""
    named = (f"Software\0{SOFTWARE}".encode(), *((b"Software\0Matplotlib",) if is_run(path.parent) else ()))
    png = b"\x89PNG\r\n\x1a\n"
    return _begins(path, lambda content: content.startswith(png) and any(name in content for name in named))


def is_page(path: Path, mark: str = PAGE) -> bool:
    """Whether it is a file that begins with ``mark``, by default a page of runs, or nothing is there."""
    return _begins(path, lambda content: content.startswith(mark.encode()))
