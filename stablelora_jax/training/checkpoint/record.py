"""The JSON of a checkpoint."""

from __future__ import annotations

import json
import operator
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from stablelora_jax.utils.errors import InputError, brief


class Record(NamedTuple):
    """What the JSON of a checkpoint holds."""

    metadata: dict[str, Any]
    leaves: dict[str, list[Any]]  # dotted name -> [shape, dtype, CRC-32 of the bytes or None]


def plain(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """As JSON gives it back."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(metadata or {})))
        return found
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata cannot be written as JSON: {brief(error)}") from None


def is_record(record: Record) -> bool:
    """Whether it has the kinds of a record; a checksum of its own says nothing about these."""
    leaves = record.leaves
    return isinstance(record.metadata, dict) and isinstance(leaves, dict) and all(map(_is_leaf, leaves.values()))


def _is_leaf(leaf: Any) -> bool:
    whole = isinstance(leaf, list) and len(leaf) == 3 and isinstance(leaf[0], list) and isinstance(leaf[1], str)
    return whole and all(type(size) is int for size in leaf[0]) and (leaf[2] is None or type(leaf[2]) is int)


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """``value`` as an int: a Python, NumPy or jax integer from ``least`` to 2**63 - 1.

    Raises:
      InputError: another number, or none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    truth = isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"
    if truth or not least <= number < 2**63:
        raise InputError(f"{name} must be a whole number from {least}, not {value!r:.60}")
    return number


def as_json(metadata: Any, leaves: Any) -> dict[str, Any]:
    """What is written: the record, and a checksum of itself."""
    return {
        "about": metadata,
        "leaves": leaves,
        "crc32": zlib.crc32(json.dumps([metadata, leaves], sort_keys=True).encode()),
    }
