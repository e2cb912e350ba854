"""The values of a ``config.json``, read key by key: each is of its kind and of a sane size, or named as wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from stablelora_jax.utils.errors import InputError

LARGEST = 2**24  # of any size: a larger one is a damaged file, and would be allocated


def size(raw: Mapping[str, Any], name: str, source: str, default: int | None = None, most: int = LARGEST) -> int:
    """A positive whole number of at most ``most``; ``default`` for an absent key and for null."""
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise InputError(f"{source}: the key {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{source}: {name} must be a positive whole number, not {value!r:.60}")
    if value > most:
        raise InputError(f"{source}: {name} {value!r:.60} is absurd; at most {most} is accepted")
    return value


def number(raw: Mapping[str, Any], name: str, source: str, default: float) -> float:
    """A positive finite number."""
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise InputError(f"{source}: {name} must be a positive number, not {value!r:.60}")
    return float(value)


def flag(raw: Mapping[str, Any], name: str, source: str) -> bool:
    """True or false; absent and null are false."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{source}: {name} must be true or false, not {value!r:.60}")
    return bool(value)


def token_ids(raw: Mapping[str, Any], name: str, source: str, default: int | None = None) -> tuple[int, ...]:
    """One token id or a list of them; ``default`` for an absent key, none for null."""
    value = raw.get(name, default)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) and -(2**31) <= token < 2**31 for token in ids):
        raise InputError(f"{source}: {name} must be token ids, not {value!r:.60}")
    return ids
