"""Saving while training goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import jax

from stablelora_jax.training.checkpoint.backend import (
    Where,
    attempt,
    is_manager,
    orbax,
    path_of,
    reason_of,
)
from stablelora_jax.training.checkpoint.leaves import checksum_of, fetched, form, named_leaves
from stablelora_jax.training.checkpoint.ownership import kind_of, remove_half_written, require_own
from stablelora_jax.training.checkpoint.reading import steps
from stablelora_jax.training.checkpoint.record import as_json, plain, whole_number
from stablelora_jax.training.checkpoint.settled import standard_handler
from stablelora_jax.utils.errors import InputError, RunError


def open_manager(
    directory: str | os.PathLike[str],
    *,
    keep: int = 2,
    best: Callable[[], int | None] = lambda: None,
    also: Callable[[], Iterable[int]] = tuple,
) -> Any:
    """An Orbax ``CheckpointManager`` to write with, made with its directory; a context manager, or ``close`` it.

    Saves are asynchronous. The last ``keep`` steps stay, and those that ``best()`` and ``also()`` name when a later one
    is saved; others go once the newer one is whole. What a killed writer left half-written is removed now. Nothing that
    is no checkpoint of ours is ever removed, nor one that has lost its record.

    Raises:
      InputError: the directory cannot be made or read; it holds something that is called like a checkpoint and is none
        of ours; or ``keep`` is not a positive whole number.
    """
    keep = whole_number("keep", keep, least=1)
    ocp, path = orbax(), path_of(directory)

    def kept(checkpoints: Any, *, context: Any) -> list[bool]:
        damaged = {c.step for c in checkpoints if is_damaged(c.step)}
        stay = {*sorted({c.step for c in checkpoints} - damaged)[-keep:], best(), *also()} | damaged
        return [c.step in stay for c in checkpoints]

    def is_damaged(step: int) -> bool:
        return (path / str(step)).exists() and kind_of(path / str(step)) != "whole"

    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories="://" in str(path),
        lightweight_initialize=True,
        preservation_policy=SimpleNamespace(should_preserve=kept),
        # where a directory cannot be made, threads that wait for it would hold up the end of the process for minutes
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        require_own(path)
        if jax.process_index() == 0:
            remove_half_written(path)
        items = {"state": standard_handler(), "about": ocp.JsonCheckpointHandler()}
        manager = ocp.CheckpointManager(path, options=options, item_handlers=items)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot keep checkpoints in {path}: {reason_of(error)}") from None
    finish, close = manager.wait_until_finished, manager.close
    manager.wait_until_finished = lambda: _run(manager, finish)  # Orbax calls it in save and close, too
    manager.close = lambda: _close(manager, close)
    return manager


def save(where: Where, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Begin to save ``state``, any tree of arrays, NumPy or of any sharding, as ``step``.

    The arrays are copied before this returns, so they may be donated or changed. ``metadata`` is anything that JSON can
    hold: the configuration, the fingerprint of the base, the place in the data.

    Raises:
      InputError: the step is no whole number from 0, or it or a later one is there; a leaf is no array, or JSON cannot
        hold ``metadata``.
      RunError: this checkpoint or the last one cannot be written; those before are whole.
    """
    step = whole_number("step", step)
    if not is_manager(where):
        with open_manager(where) as manager:
            return save(manager, step, state, metadata)
    wait(where)
    there = where.all_steps()
    if step in there:
        raise InputError(f"{where.directory} holds step {step} already: save it as another step, or elsewhere")
    if later := [s for s in there if s > step]:
        raise InputError(f"{where.directory} holds step {max(later)}, later than {step}: remove it or save elsewhere")
    if os.path.lexists(where.directory / str(step)):
        raise InputError(f"{where.directory / str(step)} is there already: move it, or save elsewhere")
    named = named_leaves(state)
    data = fetched(named)
    leaves = {name: [*form(leaf), checksum_of(data[name])] for name, leaf in named.items()}
    tree = jax.tree.unflatten(jax.tree.structure(state), [leaf if leaf.size else None for leaf in data.values()])
    args = orbax().args
    items = args.Composite(state=args.StandardSave(tree), about=args.JsonSave(as_json(plain(metadata), leaves)))
    return _run(where, lambda: where.save(step, args=items, force=True), step)


def wait(manager: Any) -> None:
    """Until everything is on the disk.

    Raises:
      RunError: it could not be written (a full or read-only disk, a removed directory); those before are whole.
    """
    manager.wait_until_finished()


def _run(manager: Any, act: Callable[[], Any], step: int | None = None) -> None:
    """Do it; what goes wrong in Orbax or its threads becomes a RunError about ``step``, else the step under way."""
    step = manager.latest_step() if step is None else step
    _, problem = attempt(act)
    if problem is None:
        return
    rest: list[int] = []
    with suppress(Exception):
        if jax.process_index() == 0:  # what it could write of it, perhaps the last space on the disk
            remove_half_written(manager.directory)
    with suppress(Exception):
        manager.reload()
        rest = [s for s in steps(manager) if s != step]
    newest = f"step {rest[-1]} is the newest complete one" if rest else "there is no other"
    raise RunError(f"cannot write checkpoint {step} in {manager.directory}: {problem}; {newest}")


def _close(manager: Any, close: Callable[[], None]) -> None:
    try:
        wait(manager)
    finally:
        with suppress(Exception):  # the same again
            close()
