"""Saving while training goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import jax

from stablelora_jax.checkpoint.backend import Where, attempt, is_manager, orbax, path_of, reason_of, silence_stragglers
from stablelora_jax.checkpoint.leaves import checksum_of, fetched, form, named_leaves
from stablelora_jax.checkpoint.reading import steps
from stablelora_jax.checkpoint.record import as_json, plain
from stablelora_jax.errors import InputError, RunError


def open_manager(
    directory: str | os.PathLike[str], *, keep: int = 2, best: Callable[[], int | None] = lambda: None
) -> Any:
    """An Orbax ``CheckpointManager`` to write with, made with its directory; a context manager, or ``close`` it.

    Saves are asynchronous. The last ``keep`` steps stay, and the one that ``best()`` names when a later one is saved;
    others go once the newer one is whole. What a killed writer left half-written is removed now.

    Raises:
      InputError: the directory cannot be made or read, or ``keep`` is not positive.
    """
    if keep < 1:
        raise InputError(f"keep must be at least 1, not {keep}")
    silence_stragglers()
    ocp, path = orbax(), path_of(directory)

    def kept(checkpoints: Any, *, context: Any) -> list[bool]:
        stay = {*sorted(c.step for c in checkpoints)[-keep:], best()}
        return [c.step in stay for c in checkpoints]

    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
        preservation_policy=SimpleNamespace(should_preserve=kept),
        # where a directory cannot be made, threads that wait for it would hold up the end of the process for minutes
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        manager = ocp.CheckpointManager(path, options=options)
    except Exception as error:
        raise InputError(f"cannot keep checkpoints in {path}: {reason_of(error)}") from None
    finish, close = manager.wait_until_finished, manager.close
    manager.wait_until_finished = lambda: _run(manager, finish)  # Orbax calls it in save and close, too
    manager.close = lambda: _close(manager, close)
    return manager


def save(where: Where, step: int, state: Any, about: Mapping[str, Any] | None = None) -> None:
    """Begin to save ``state``, any tree of arrays, NumPy or of any sharding, as ``step``; a step saved already is kept.

    The arrays are copied before this returns, so they may be donated or changed. ``about`` is anything that JSON can
    hold: the configuration, the fingerprint of the base, the place in the data.

    Raises:
      InputError: the step is negative, a leaf is no array, JSON cannot hold ``about``, or a later step is there.
      RunError: this checkpoint or the last one cannot be written; those before are whole.
    """
    if not is_manager(where):
        with open_manager(where) as manager:
            return save(manager, step, state, about)
    if step < 0:
        raise InputError(f"a step is a number from 0, not {step}")
    wait(where)
    there = where.all_steps()
    if step in there:
        return None
    if later := [s for s in there if s > step]:
        raise InputError(f"{where.directory} holds step {max(later)}, later than {step}: remove it or save elsewhere")
    named = named_leaves(state)
    data = fetched(named)
    leaves = {name: [*form(leaf), checksum_of(data[name])] for name, leaf in named.items()}
    tree = jax.tree.unflatten(jax.tree.structure(state), [leaf if leaf.size else None for leaf in data.values()])
    args = orbax().args
    items = args.Composite(state=args.StandardSave(tree), about=args.JsonSave(as_json(plain(about), leaves)))
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
            (manager.directory / f"{step}.orbax-checkpoint-tmp").rmtree()
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
