"""Dotted names of modules and the patterns that select them.

A *name* is what users write and read, with the layer's number: ``model.layers.3.self_attn.q_proj``. One path whose
leaves carry a leading stack axis stands for as many names as the axis is long.

Patterns mean what they mean in PEFT (``peft/tuners/tuners_utils.py:check_target_module_exists`` and
``peft/utils/other.py:get_pattern_key``), except that a pattern which matches nothing is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from stablelora_jax.utils import patterns
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

FEW = 8  # names that are compared one after another


def stack_depth(path: Path, stacked: Sequence[str]) -> int:
    """How many leading axes of the leaves at ``path`` are stacks: one for each component named in ``stacked``.

    A component followed by a number is a list of separate modules (``layers/0/...``), not a stack.
    """
    following = (*path, "")[1:]
    return sum(key in stacked and not after.isdigit() for key, after in zip(path, following, strict=True))


def module_names(path: Path, stack: Sequence[int], stacked: Sequence[str]) -> tuple[str, ...]:
    """The dotted names behind ``path``, in C order over the axes ``stack``.

    Axes beyond the components named in ``stacked`` are shown at the end: ``blocks.dense[2]``.
    """
    return tuple(_name(path, index, stacked) for index in np.ndindex(*stack))


def _name(path: Path, index: tuple[int, ...], stacked: Sequence[str]) -> str:
    parts, left = [], list(index)
    for key, after in zip(path, (*path, "")[1:], strict=True):
        parts.append(key)
        if key in stacked and not after.isdigit() and left:
            parts.append(str(left.pop(0)))
    return ".".join(parts) + "".join(f"[{i}]" for i in left)


def unindexed(name: str) -> str:
    """A module's name without the indices at its end, by which patterns select it.

    Example::

        >>> unindexed("blocks.dense[2]")
        'blocks.dense'
    """
    return re.sub(r"(\[\d+\])+$", "", name)


def layer_number(name: str, stacked: Sequence[str]) -> int | None:
    """The number of the layer a module sits in: ``model.layers.3.mlp`` and ``layers_3.mlp`` give 3."""
    for part in name.split("."):
        stack, underscore, digits = part.rpartition("_")
        if stacked and digits.isdecimal() and (not underscore or stack in stacked):
            return int(digits)
    return None


def kind_of(path: Path, stacked: Sequence[str]) -> Path:
    """The path of a module without numbers, which is the same in every layer.

    Example::

        >>> kind_of(("model", "layers", "3", "mlp"), ("layers",)), kind_of(("layers_3", "mlp"), ("layers",))
        (('model', 'layers', 'mlp'), ('layers', 'mlp'))
    """
    parts = []
    for part in path:
        stack, underscore, digits = part.rpartition("_")
        if not part.isdecimal():
            parts.append(stack if underscore and digits.isdecimal() and stack in stacked else part)
    return tuple(parts)


def matches(pattern: str | Iterable[str], name: str) -> bool:
    """PEFT's rule for targets: a string is a regular expression (full match), a list holds name suffixes."""
    if isinstance(pattern, str):
        return patterns.matches_whole(pattern, name)
    if isinstance(pattern, tuple) and len(pattern) > FEW:
        return not _set(pattern).isdisjoint(patterns.endings(name))
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)


def lists_one(suffixes: tuple[str, ...], names: Iterable[str]) -> bool:
    """Whether a list of suffixes :func:`matches` one of ``names``."""
    wanted = _set(suffixes)
    return any(not wanted.isdisjoint(patterns.endings(name)) for name in names)


def pattern_matches(pattern: str, name: str) -> bool:
    """PEFT's rule for keys of ``rank_pattern`` and ``alpha_pattern``: a regular expression for the name's end."""
    return bool(patterns.table((pattern,)).numbers(name))


def first_match(pairs: tuple[tuple[str, Any], ...], name: str, default: Any = None) -> Any:
    """The value of the first of ``(pattern, value)`` whose pattern :func:`pattern_matches` ``name``."""
    found = patterns.table(_keys(pairs)).numbers(name) if pairs else ()
    return pairs[min(found)][1] if found else default


def hits(keys: Iterable[str], names: Iterable[str]) -> set[str]:
    """The patterns among ``keys`` that :func:`pattern_matches` one of ``names``."""
    keys = tuple(keys)
    found = patterns.table(keys)
    return {keys[number] for name in names for number in found.numbers(name)} if keys else set()


def suffixes(names: Iterable[str]) -> set[str]:
    """Every suffix that a list for :func:`matches` may hold to match one of ``names``."""
    return {end for name in names for end in patterns.endings(name)}


@lru_cache(64)
def _set(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


@lru_cache(64)
def _keys(pairs: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    return tuple(key for key, _ in pairs)


def require_match(kind: str, pattern: str, hit: bool, candidates: Sequence[str]) -> None:
    """Raise :class:`InputError` with near misses among ``candidates`` unless ``hit``."""
    if hit:
        return
    endings = sorted({part for name in candidates for part in (name, name.rsplit(".", 1)[-1])})
    close = difflib.get_close_matches(pattern[:80], endings, n=3, cutoff=0.5)
    last = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    hint = f"did you mean {', '.join(close)}?" if close else f"modules here end in: {', '.join(last[:12])}"
    if not last:
        hint = "no leaf here is called kernel or embedding; adapted(model, spec).init(key, params, *args) finds others"
    raise InputError(f"{kind} {pattern!r:.80} matches no module; {hint}")
