"""Numbers that optimizers take, checked where the optimizer is made.

What is known only later passes unseen: schedules, traced values and arrays of JAX, which ``inject_hyperparams``,
``vmap`` over rates and rates that are arguments of a compiled step hand over.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.utils.errors import InputError

SCHEDULED = ("learning_rate", "stiefel_learning_rate", "weight_decay", "ratio", "shrink_ratio")  # number or schedule
SHARES = ("b1", "b2", "momentum", "shrink_ratio", "shrink_until_stable")  # in [0, 1)
POSITIVE = ("ratio", "eta")  # all others may be 0
LARGEST, LARGEST_INT = float(np.finfo(np.float32).max), int(np.iinfo(np.int32).max)


def require_numbers(**numbers: Any) -> None:
    """Check the numbers of an optimizer by the names of its arguments.

    Raises:
      InputError: one that is no number (None, a bool, a string, an array of several), is negative, NaN or beyond
        float32 (an int: beyond int32), or where 0 and 1 bound it lies outside.
    """
    for name, number in numbers.items():
        if isinstance(number, jax.Array) or (callable(number) and name in SCHEDULED):
            continue
        if not _is_real(number):
            kinds = "a number or a schedule" if name in SCHEDULED else "a number"
            raise InputError(f"{name} must be {kinds}, not {number!r:.60}")
        plain = number if isinstance(number, int) else float(number)
        if name in SHARES and not 0 <= plain < 1:
            raise InputError(f"{name} must be in [0, 1), not {number!r:.60}")
        if name in POSITIVE and not plain > 0:
            raise InputError(f"{name} must be positive, not {number!r:.60}")
        if plain < 0:
            raise InputError(f"{name} must not be negative: {number!r:.60}")
        if not plain <= (LARGEST_INT if isinstance(plain, int) else LARGEST):
            raise InputError(f"{name} must be a finite float32, or an int32, not {number!r:.60}")


def require_whole(low: int, **numbers: Any) -> None:
    """Check static arguments: Python or NumPy integers from ``low`` to what 64 bits hold.

    Raises:
      InputError: something else, a traced value too.
    """
    for name, number in numbers.items():
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not whole or not low <= number < 2**63:
            limits = f"a whole number of at least {low}" if low >= 0 else "a whole number of 64 bits"
            raise InputError(f"{name} must be {limits}, not {number!r:.60} (static: see static_args)")


def _is_real(number: Any) -> bool:
    """Whether ``number`` is one real number of Python or NumPy."""
    if isinstance(number, np.generic | np.ndarray):
        kind = number.dtype
        return number.ndim == 0 and bool(jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating))
    return isinstance(number, int | float) and not isinstance(number, bool)
