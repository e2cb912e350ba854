"""Checks that several objectives make of their arguments."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.utils.errors import InputError


def matching(**given: Any) -> list[jax.Array]:
    """``given`` as arrays of one shape (B,).

    Raises:
      InputError: naming two that differ.
    """
    arrays = {name: jnp.asarray(x) for name, x in given.items()}
    (first, one), *others = arrays.items()
    for name, found in others:
        if found.shape != one.shape:
            raise InputError(
                f"{first} {one.shape} and {name} {found.shape} must have one shape, a number for each sequence"
            )
    return list(arrays.values())


def require_number(name: str, value: Any, least: float, most: float = math.inf, *, closed: bool = False) -> None:
    """Check a number of Python; one that is traced is not checked.

    Raises:
      InputError: it is not in (least, most), or with ``closed`` not in [least, most).
    """
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < most:
        raise InputError(f"{name} must be a number in [{least:g}, {most:g}), not {value!r}")
    if not closed and value == least:
        raise InputError(f"{name} must be above {least:g}, not {value!r}")
