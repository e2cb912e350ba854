"""What lies in a directory of checkpoints, and getting it back."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from stablelora_jax.training.checkpoint.backend import Where, attempt, is_manager, orbax, path_of, reason_of
from stablelora_jax.training.checkpoint.leaves import checksum_of, form, named_leaves, place, wanted
from stablelora_jax.training.checkpoint.ownership import candidates, kind_of
from stablelora_jax.training.checkpoint.record import Record, as_json, is_record, plain, whole_number
from stablelora_jax.training.checkpoint.settled import standard_handler
from stablelora_jax.training.checkpoint.wording import differences, shown_forms, shown_values, some
from stablelora_jax.utils.errors import InputError


def latest(where: Where) -> int | None:
    """The newest complete step, or None."""
    return max(steps(where), default=None)


def steps(where: Where) -> list[int]:
    """All steps of ours on the disk, rising; one that is being written, or was left half-written, is not there."""
    complete = lambda p: "://" not in str(p) or (p / "commit_success.txt").exists()  # noqa: E731  (buckets rename not)
    return sorted(step for step, p in _entries(where).items() if kind_of(p) == "whole" and complete(p))


def require_undamaged(where: Where) -> None:
    """Check that nothing later than the newest complete step is a checkpoint that has lost its record.

    Raises:
      InputError: naming it, and the way out.
    """
    damaged = [step for step, p in _entries(where).items() if kind_of(p) == "damaged" and "://" not in str(p)]
    if damaged and max(damaged) > max(steps(where), default=-1):
        raise _damaged(path_of(where), max(damaged), "about/metadata is missing")


def read_metadata(where: Where, step: int | None = None) -> dict[str, Any]:
    """What :func:`save` was told about the newest checkpoint, or that of ``step``.

    Raises:
      InputError: there is none, or it is damaged.
    """
    path, step = _chosen(where, step)
    return _record(path, step).metadata


def restore(
    where: Where,
    state: Any,
    *,
    step: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    accept_changes: bool = False,
) -> Any:
    """The newest checkpoint, or that of ``step``, in the structure, shapes and dtypes of ``state``; it removes nothing.

    Leaves of ``state`` are arrays or ``jax.ShapeDtypeStruct``: NumPy (or no sharding) gives NumPy, a ``jax.Array`` or a
    struct with a sharding gives an array of that sharding, whatever the layout that it was written from. Each key of
    ``metadata`` must be as it was saved, unless ``accept_changes``; saved keys that it lacks are not compared.

    Raises:
      InputError: there is no complete checkpoint; it is damaged; its leaves have other names, shapes or dtypes; or
        ``metadata`` differs. One line that says what to do.
    """
    path, step = _chosen(where, step)
    record, named = _record(path, step), named_leaves(state)
    ours = "go on with what it was saved with, or save elsewhere"
    here = {name: list(form(leaf)) for name, leaf in named.items()}
    if odd := differences({name: leaf[:2] for name, leaf in record.leaves.items()}, here, shown_forms):
        raise InputError(f"{path / str(step)} does not fit: {some(odd)}; {ours}")
    asked = plain(metadata)
    odd = differences({key: value for key, value in record.metadata.items() if key in asked}, asked, shown_values)
    if odd and not accept_changes:
        raise InputError(f"{path / str(step)} is of another run: {some(odd)}; {ours} (or accept_changes=true)")
    values = _read(path, step, state, record)
    for name, value in values.items():
        if record.leaves[name][2] not in (None, checksum_of(value)):
            raise _damaged(path, step, f"{name} is not what was written")
    placed = [place(values[name], leaf) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(state), placed)


def _entries(where: Where) -> dict[int, Any]:
    """What is called like a step."""
    path = path_of(where)
    try:
        return candidates(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)}): make it readable, or save elsewhere") from None


def _chosen(where: Where, step: int | None) -> tuple[Any, int]:
    """The directory, and the step to read, once nothing is being written any more."""
    if is_manager(where):
        where.wait_until_finished()
    step = None if step is None else whole_number("step", step)
    path, there = path_of(where), steps(where)
    if step in there:
        return path, step
    found = _entries(where)
    asked = found if step is None else {step: found[step]} if step in found else {}
    if step is None and there:
        require_undamaged(where)
        return path, there[-1]
    if asked:
        _refuse(asked[max(asked)])
    if not there:
        raise InputError(f"{path} holds no complete checkpoint")
    raise InputError(f"{path} holds no step {step}, but {', '.join(map(str, there))}")


def _refuse(entry: Any) -> NoReturn:
    """Say why the directory, called like a step, is none that can be read."""
    if kind_of(entry) == "damaged":
        raise _damaged(entry.parent, int(entry.name), "about/metadata is missing")
    orbax_own = ": read it with Orbax" if (entry / "default").is_dir() else ""
    raise InputError(f"{entry} was not written by stablelora_jax.training.checkpoint{orbax_own}")


def _record(path: Any, step: int) -> Record:
    try:
        raw = json.loads((path / str(step) / "about" / "metadata").read_text())
        record = Record(raw["about"], raw["leaves"])
        if raw == as_json(*record) and is_record(record):
            return record
        reason = "about/metadata is not what was written"
    except FileNotFoundError:
        reason = "about/metadata is missing"
    except OSError as error:
        reason = f"about/metadata: {reason_of(error)}"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        reason = "about/metadata is no JSON of ours"
    raise _damaged(path, step, reason)


def _read(path: Any, step: int, state: Any, record: Record) -> dict[str, Any]:
    """The leaves by name, on the host or where :func:`wanted` has asked for them."""
    ocp, named = orbax(), named_leaves(state)
    asked = {name: wanted(leaf, record.leaves[name][2]) for name, leaf in named.items()}
    item = jax.tree.unflatten(jax.tree.structure(state), list(asked.values()))

    def read() -> Any:
        with ocp.Checkpointer(standard_handler()) as checkpointer:
            return checkpointer.restore(path / str(step) / "state", args=ocp.args.StandardRestore(item))

    tree, problem = attempt(read)
    if problem is not None:
        raise _damaged(path, step, f"state: {problem[:120]}")
    values = iter(jax.tree.leaves(tree))
    empty = lambda name: np.zeros(np.shape(named[name]), named[name].dtype)  # noqa: E731  (Orbax keeps none)
    return {name: empty(name) if like is None else next(values) for name, like in asked.items()}


def _damaged(path: Any, step: int, reason: str) -> InputError:
    others = [s for s in steps(path) if s != step]
    rest = f"to go on from step {others[-1]}" if others else "to begin anew"
    way_out = f"remove {path / str(step)} {rest}"
    if os.strerror(errno.EACCES) in reason:
        way_out = "make it readable"
    return InputError(f"{path / str(step)} cannot be read ({reason}): {way_out}")
