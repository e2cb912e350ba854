"""A validation split for sets that have none: one question in 64 of the training split, by what the question says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

from stablelora_jax.data.tasks.question import Problem
from stablelora_jax.utils.errors import InputError

SHARE = 64


def split_train(load: Callable[[], Sequence[tuple[Problem, str]]], split: str, held_out: bool) -> list[Problem]:
    """``train`` or ``validation`` of what ``load`` gives: problems, each with the question that it goes back to.

    Rows that go back to one question are on one side. Without ``held_out``, ``train`` is all of it.

    Raises:
      InputError: there is no such split, or nothing is held out and so there is no validation.
    """
    if split not in ("train", "validation"):
        raise InputError(f"there is no split {split!r} here; the splits are train and validation (held out of it)")
    if split == "validation" and not held_out:
        raise InputError("nothing is held out of the training split: task.held_out=true, or evaluate=false")
    wanted, made = split == "validation", load()
    found = [problem for problem, origin in made if (held_out and crc32(origin.encode()) % SHARE == 0) == wanted]
    if not found:
        raise InputError(f"of {len(made)} rows none belongs to {split}: one question in {SHARE} is held out")
    return found
