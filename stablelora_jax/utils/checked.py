"""One check at the public door: what a caller gives is of the kinds that the annotations say, or one line says not.

``@checked`` stands on functions that users call, and on nothing that runs within a step. `beartype
<https://beartype.readthedocs.io>`_ compares arguments with the annotations; it is imported at the first call.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

from stablelora_jax.utils.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])


class _WrongKindError(Exception):
    """What beartype raises here."""


def checked(function: F) -> F:
    """``function``, which raises :class:`InputError` where an argument is not what its annotation says."""
    made: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def door(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(_compared(function))
        try:
            return made[0](*args, **kwargs)
        except _WrongKindError as error:
            raise InputError(_line(function, str(error))) from None

    return cast(F, door)


def _compared(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with beartype's comparison of its arguments; what it returns is ours."""
    from beartype import BeartypeConf, beartype

    whole = function.__annotations__
    function.__annotations__ = {name: kind for name, kind in whole.items() if name != "return"}
    try:
        return beartype(conf=BeartypeConf(violation_param_type=_WrongKindError, is_pep484_tower=True))(function)
    finally:
        function.__annotations__ = whole


def _line(function: Callable[..., Any], said: str) -> str:
    """``merge: spec must be LoraSpec, not 3``."""
    found = re.search(r"parameter (\w+)=(.*?) violates type hint", said, re.DOTALL)
    if not found:
        return said
    name, value = found[1], " ".join(found[2].split())
    kind = inspect.signature(function).parameters[name].annotation
    kind = re.sub(r"(collections\.abc|typing)\.", "", kind if isinstance(kind, str) else inspect.formatannotation(kind))
    return f"{function.__name__}: {name} must be {kind}, not {value:.60}"


def as_dtype(value: Any, name: str = "dtype") -> Any:
    """``value`` as a dtype.

    Raises:
      InputError: it names none.
    """
    import jax.numpy as jnp

    try:
        return jnp.dtype(value)
    except TypeError:
        raise InputError(f"{name} must be a dtype, such as float32 or bfloat16, not {value!r:.60}") from None
