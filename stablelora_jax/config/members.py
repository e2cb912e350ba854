"""A section that describes the call of a function: its keys are the arguments, with their types and defaults."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from stablelora_jax.config.keys import choices


def member(
    function: Callable[..., Any],
    base: type,
    *names: str,
    skip: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    more: Sequence[tuple[str, Any, Any]] = (),
) -> Any:
    """The frozen dataclass, derived from ``base``, whose keys are ``name`` and the arguments of ``function``.

    Args:
      function: the help shows its docstring, in Google's style.
      base: a dataclass whose fields come first.
      names: what ``name`` may be, the usual one first; by default the function's.
      skip: arguments that are no keys.
      defaults: of arguments that have none.
      more: further fields: name, type, field.
    """
    names = names or (function.__name__,)
    hints = get_type_hints(function, include_extras=True)
    keys: list[tuple[str, Any, Any]] = [("name", Literal[names], field(default=names[0]))]
    for key, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        if default is inspect.Parameter.empty:
            default = (defaults or {}).get(key, MISSING)
        if key not in skip:
            keys.append((key, _kind(hints[key], default), field(default=default)))
    return make_dataclass(
        "".join(part.title() for part in names[0].split("_")),
        [*keys, *more],
        bases=(base,),
        frozen=True,
        kw_only=any(f.default is MISSING for _, _, f in keys),
        namespace={"__doc__": function.__doc__, "__module__": base.__module__, "function": staticmethod(function)},
    )


def arguments_of(config: Any) -> dict[str, Any]:
    """The keyword arguments for ``config.function``: the values of its keys."""
    own = inspect.signature(config.function).parameters
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name in own}


def _kind(hint: Any, default: Any) -> Any:
    """The type of a key: what may be a scalar or a schedule is a number in a file."""
    plain = not isinstance(default, float) or NoneType in choices(hint) or get_origin(hint) is Annotated
    return hint if plain else float
