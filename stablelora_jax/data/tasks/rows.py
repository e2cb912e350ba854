"""Rows of a task: lines of a local file, or a data set of the hub, and the checks that every task makes of them.

A local directory holds ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (or ``.jsonl.gz``), one object a line:
the hub's own columns, or normalised multiple choice: ``{"context"?, "question"?, "choices": [...], "label": 0}``.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stablelora_jax.utils.errors import InputError, brief, named
from stablelora_jax.utils.files import as_path

T = TypeVar("T")
LONGEST_LINE = 1 << 26  # bytes of a row
LONGEST_ARRAY = 1 << 30  # bytes of one array of rows, which is read whole
GROWTH = 200  # text packs some ten times; what packs better is made to fill the memory
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


class Unsupported(ValueError):
    """A row that is whole and cannot be used here: its text says why, and the way out."""


def parse(origin: str, rows: Iterable[Any], split: str, make: Make[T]) -> list[T]:
    """``make(row, id)`` of every row; ``origin`` names them in errors."""
    found = []
    for number, row in enumerate(rows):
        where = f"{origin}: row {number + 1}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where} is damaged (it is {type(row).__name__}, not an object with columns)")
        try:
            found.append(make(row, str(row.get("id", f"{split}-{number}"))))
        except Unsupported as error:
            raise InputError(f"{where}: {error}") from None
        except KeyError as error:
            raise InputError(f"{where} has no column {error}; its columns are {', '.join(map(str, row))}") from None
        except (TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise InputError(f"{where} is damaged ({named(error)})") from None
    if not found:
        raise InputError(f"{origin} has no rows")
    return found


def local_split(directory: Path, split: str) -> tuple[str, list[Any]]:
    """``(origin, rows)`` of ``split`` in a directory."""
    directory = as_path(directory, "task.path")
    plain, packed = directory / f"{split}.jsonl", directory / f"{split}.jsonl.gz"
    if not plain.is_file() and not packed.is_file():
        if not directory.is_dir():
            what = f"is a file: give its directory, {directory.parent}" if directory.exists() else "does not exist"
            raise InputError(f"{directory} {what}; a directory with {plain.name} is needed")
        way = "; a run without validation has evaluate=false" if split == "validation" else ""
        raise InputError(f"{directory} has neither {plain.name} nor {packed.name}{way}")
    return file_rows(plain if plain.is_file() else packed)


def file_rows(file: Path) -> tuple[str, list[Any]]:
    """``(origin, rows)`` of one ``.jsonl`` or ``.jsonl.gz``: an object a line, or one JSON array of objects.

    As ``datasets`` reads them: a byte-order mark and lines without a character are skipped.
    """
    rows: list[Any] = []
    number = 0
    try:
        with _opened(file) as raw:
            for line in _lines(raw, file):
                number += 1
                if not rows and line.lstrip().startswith(b"["):
                    rest = b"".join(_lines(raw, file, most=LONGEST_ARRAY))
                    return str(file), _array(line + rest, file)
                if line.strip():
                    rows.append(json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: line {number} is not JSON ({brief(error)})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file}: line {number + 1} cannot be unpacked ({brief(error)})") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    return str(file), rows


def _array(text: bytes, file: Path) -> list[Any]:
    """The rows of one JSON array; lines that are each an array are damaged rows, which the caller finds."""
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is neither an object a line nor one JSON array of objects ({brief(error)})") from None
    return found if isinstance(found, list) else [found]


def _opened(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _lines(raw: Any, file: Path, most: int | None = None) -> Iterator[bytes]:
    """The lines of an open file, none longer than :data:`LONGEST_LINE`, and no more than is sane for its size.

    Raises:
      InputError: it is a bomb: a line without end, or a packed file that grows more than :data:`GROWTH` times.
    """
    packed = file.stat().st_size * GROWTH + LONGEST_LINE if file.suffix == ".gz" else None
    total, first = 0, raw.tell() == 0
    while line := raw.readline(LONGEST_LINE + 1):
        total += len(line)
        if len(line) > LONGEST_LINE:
            raise InputError(f"{file}: a line is longer than {LONGEST_LINE >> 20} MiB: put one row on a line")
        if most is not None and total > most:
            raise InputError(f"{file}: an array is longer than {most >> 20} MiB: put one row on a line")
        if packed is not None and total > packed:
            raise InputError(f"{file} unpacks to more than {GROWTH} times its size: unpack it, and give the .jsonl")
        yield line.removeprefix(codecs.BOM_UTF8) if first else line
        first = False


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
        raise ValueError(f"{key} is {value!r:.40}: a string that is not empty is needed")
    value.encode()  # half of a surrogate pair is no text
    return value


def lettered(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """``(texts, right one)`` of ``{"choices": {"text", "label"}, "answerKey"}``, as AI2 writes them, or normalised."""
    if not isinstance(row["choices"], Mapping):
        return row["choices"], row["label"]
    texts, labels, key = row["choices"]["text"], row["choices"]["label"], str(row["answerKey"]).strip()
    if not key:
        raise ValueError("it has no answerKey: an unlabelled split can be used neither for training nor for evaluation")
    if len(labels) != len(texts) or key not in labels:
        raise ValueError(f"answerKey {key!r} is none of the {len(texts)} choices {labels!r}")
    return texts, labels.index(key)


def numbered(label: Any, first: int) -> int:
    """The label as an index, from a string that counts from ``first``."""
    if label in ("", None) or label == "-1":
        raise ValueError("it has no label: an unlabelled split can be used neither for training nor for evaluation")
    return int(label) - first


def choices(texts: Any, label: Any) -> tuple[tuple[str, ...], int]:
    """The choices, each behind one space, and the label, both checked."""
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) and one.strip() for one in texts):
        raise ValueError("a choice is empty or no string")
    "".join(texts).encode()
    if label is None:
        raise ValueError("it has no label: an unlabelled split can be used neither for training nor for evaluation")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(texts):
        raise ValueError(f"label {label!r} for {len(texts)} choices: an integer counting from 0 is needed")
    return tuple(f" {one}" for one in texts), label
