"""Rows of a task: lines of a local file, or a data set of the hub, and the checks that every task makes of them.

A local directory holds ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (or ``.jsonl.gz``), one object a line:
the hub's own columns, or normalised multiple choice: ``{"context"?, "question"?, "choices": [...], "label": 0}``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stablelora_jax.errors import InputError, brief, named

T = TypeVar("T")
Make = Callable[[Mapping[str, Any], str], T]


class Hub(NamedTuple):
    """Where the hub has a task."""

    repository: str
    config: str | None = None


def load(hub: Hub, split: str, path: str | None, make: Make[T]) -> list[T]:
    """``make(row, id)`` of every row of a split; ``id`` is the row's own, or its split and number.

    Args:
      hub: read where there is no ``path``, through ``datasets``.
      split: ``train``, ``validation`` or ``test``.
      path: a local directory, or None.
      make: raises ``ValueError`` (or what comes of a missing or misshapen value) for a row that it cannot use.

    Raises:
      InputError: the split cannot be had, is empty, or has a damaged row, which is named by its number from 1.
    """
    return parse(*(local_split(Path(path), split) if path else hub_rows(hub, split)), split, make)


def parse(origin: str, rows: Iterable[Any], split: str, make: Make[T]) -> list[T]:
    """``make(row, id)`` of every row; ``origin`` names them in errors."""
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(make(row, str(row.get("id", f"{split}-{number}"))))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = named(error)
            raise InputError(f"{origin}: row {number + 1} is damaged ({reason})") from None
    if not found:
        raise InputError(f"{origin} has no rows")
    return found


def local_split(directory: Path, split: str) -> tuple[str, list[Any]]:
    """``(origin, rows)`` of ``split`` in a directory."""
    plain, packed = directory / f"{split}.jsonl", directory / f"{split}.jsonl.gz"
    if not plain.is_file() and not packed.is_file():
        raise InputError(f"{directory} has neither {plain.name} nor {packed.name}")
    return file_rows(plain if plain.is_file() else packed)


def file_rows(file: Path) -> tuple[str, list[Any]]:
    """``(origin, rows)`` of one ``.jsonl`` or ``.jsonl.gz``."""
    rows: list[Any] = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for line in lines:
                rows.append(json.loads(line))
    except (ValueError, EOFError, gzip.BadGzipFile, RecursionError) as error:
        raise InputError(f"{file}: line {len(rows) + 1} is not JSON ({brief(error)})") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    return str(file), rows


def hub_rows(hub: Hub, split: str) -> tuple[str, Iterable[Any]]:
    """``(origin, rows)`` of a split on the hub."""
    import datasets

    origin = " ".join(part for part in (*hub, split) if part)
    try:
        return origin, datasets.load_dataset(hub.repository, hub.config, split=split)
    except Exception as error:  # offline, unknown split, damaged cache: datasets raises many kinds
        reason = named(error)
        raise InputError(f"{origin} could not be had ({reason}); give a local directory as task.path") from None


def text(row: Mapping[str, Any], key: str) -> str:
    """The string ``row[key]``, which must hold a character that shows."""
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is empty or no string")
    return value


def lettered(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """``(texts, right one)`` of ``{"choices": {"text", "label"}, "answerKey"}``, as AI2 writes them, or normalised."""
    if not isinstance(row["choices"], Mapping):
        return row["choices"], row["label"]
    texts, labels, key = row["choices"]["text"], row["choices"]["label"], str(row["answerKey"]).strip()
    if not key:
        raise ValueError("it has no answerKey: an unlabelled split can be neither learnt nor measured")
    if len(labels) != len(texts) or key not in labels:
        raise ValueError(f"answerKey {key!r} is none of the {len(texts)} choices {labels!r}")
    return texts, labels.index(key)


def numbered(label: Any, first: int) -> int:
    """The label as an index, from a string that counts from ``first``."""
    if label in ("", None) or label == "-1":
        raise ValueError("it has no label: an unlabelled split can be neither learnt nor measured")
    return int(label) - first


def choices(texts: Any, label: Any) -> tuple[tuple[str, ...], int]:
    """The choices, each behind one space, and the label, both checked."""
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) and one.strip() for one in texts):
        raise ValueError("a choice is empty or no string")
    if label is None:
        raise ValueError("it has no label: an unlabelled split can be neither learnt nor measured")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(texts):
        raise ValueError(f"label {label!r} for {len(texts)} choices")
    return tuple(f" {one}" for one in texts), label
