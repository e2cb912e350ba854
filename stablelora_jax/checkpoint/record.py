"""The JSON of a checkpoint."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from stablelora_jax.errors import InputError, brief


class Record(NamedTuple):
    """What the JSON of a checkpoint holds."""

    about: dict[str, Any]
    leaves: dict[str, list[Any]]  # dotted name -> [shape, dtype, CRC-32 of the bytes or None]


def plain(about: Mapping[str, Any] | None) -> dict[str, Any]:
    """As JSON gives it back."""
    try:
        return json.loads(json.dumps(dict(about or {})))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"about cannot be written as JSON: {brief(error)}") from None


def as_json(about: Any, leaves: Any) -> dict[str, Any]:
    """What is written: the record, and a checksum of itself."""
    return {"about": about, "leaves": leaves, "crc32": zlib.crc32(json.dumps([about, leaves], sort_keys=True).encode())}
