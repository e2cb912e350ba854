"""The keys of a configuration: the fields of a frozen dataclass, with meaning, older names and check."""

import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from stablelora_jax.utils.errors import InputError

UNION, MAP = (Union, UnionType), (dict, Mapping)
REQUIRED: Any = MISSING  # option(REQUIRED, "...") is a key without a default
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # of msgspec.Meta


class KeyProblem(InputError):
    """An :class:`InputError` about one key."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def option(default: Any, help: str, *, was: str | None = None, renamed: Mapping[str, str] | None = None) -> Any:
    """A dataclass field with its meaning.

    Args:
      default: the value of an absent key.
      help: what the key means, in a line.
      was: the key's name in older versions, which is refused with a pointer to the new one.
      renamed: old names of its values, likewise.
    """
    metadata = {"help": help, "was": was, "renamed": renamed or {}}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(default: Callable[[], Any], help: str) -> Any:
    """A field that is itself a dataclass; ``default`` is the class, or a function that gives None."""
    return field(default_factory=default, metadata={"help": help})


def _keys_of(cls: Any) -> dict[str, tuple[Field[Any], Any]]:
    """The fields that can be set, by name, each with its declared type."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: (f, hints[f.name]) for f in fields(cls) if f.init}


keys_of: Callable[[Any], dict[str, tuple[Field[Any], Any]]] = cache(_keys_of)


def choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if get_origin(kind) is Annotated:
        return choices(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) in UNION else (kind,)


def sections(kind: Any) -> list[Any]:
    """The dataclasses that a key can be; none when it is a plain value."""
    return [cls for choice in choices(kind) if is_dataclass(choice) for cls in _members(choice)]


def _members(cls: Any) -> list[Any]:
    """The class itself, or where its ``name`` may be any text, those that derive from it."""
    if "name" not in keys_of(cls) or names_of(cls):
        return [cls]
    return [member for part in cls.__subclasses__() for member in _members(part)]


def names_of(cls: Any) -> tuple[str, ...]:
    """What a section's ``name`` may be."""
    return get_args(keys_of(cls)["name"][1])


def by_name(members: list[Any]) -> dict[str, Any]:
    """The members of a union of sections by their names."""
    return {name: member for member in members for name in names_of(member)}


def dotted(cls: Any, path: str = "") -> Iterator[str]:
    """Every key of the section and of those inside it, as ``lora.rank``."""
    for name, (_, kind) in keys_of(cls).items():
        yield path + name
        for member in sections(kind):
            yield from dotted(member, f"{path}{name}.")


def old_names(cls: Any) -> dict[str, str]:
    """What the keys of a section were called in older versions."""
    return {f.metadata["was"]: name for name, (f, _) in keys_of(cls).items() if f.metadata.get("was")}


def renamed(f: Field[Any], value: Any) -> Any:
    """The name of today of a key's value; the value itself where it has not changed."""
    return f.metadata.get("renamed", {}).get(value, value) if isinstance(value, str) else value


def with_new_names(cls: Any, data: Any) -> Any:
    """``data``, a configuration as an older version dumped it, with the names of today."""
    if not isinstance(data, Mapping):
        return data
    old, made = old_names(cls), {}
    for key, value in data.items():
        key = old.get(key, key)
        if key in keys_of(cls):
            f, kind = keys_of(cls)[key]
            members, value = sections(kind), renamed(f, value)
            value = with_new_names(members[0], value) if len(members) == 1 else value
        made[key] = value
    return made


def checked(kind: Any, value: Any, key: str) -> Any:
    """``value`` as the declared type, which is not a section; ``key`` is its name in the message.

    Raises:
      KeyProblem: it is of another type or out of range.
    """
    members, problem, wanted = choices(kind), "", type_text(kind)
    try:
        if not isinstance(value, float) or math.isfinite(value):
            return msgspec.convert(value, kind)
        wanted = f"a finite {wanted}"
    except ValueError as error:
        problem = str(error)
    for choice in members:  # name the item that does not fit, if it is one
        args, items = get_args(choice), []
        if get_origin(choice) in MAP and isinstance(value, Mapping):
            items = [(args[0], k, f"{key}: its key") for k in value]
            items += [(args[1], item, f"{key}.{k}") for k, item in value.items()]
        elif get_origin(choice) is tuple and ... in args and isinstance(value, list | tuple):
            items = [(args[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
        for item in items:
            checked(*item)
    if {"<", ">"} & set(problem) and (limits := " or ".join(filter(None, map(range_text, (kind, *members))))):
        raise KeyProblem(key, f"{key} must be {limits}{' or null' * (NoneType in members)}, not {shown(value)}")
    hint = f' (as text: "{shown(value)}", quotes included)' if str in members and isinstance(value, int | float) else ""
    raise KeyProblem(key, f"{key} wants {wanted}, got {shown(value)}{hint}")


def range_text(kind: Any) -> str:
    """The limits of an annotated number in words; "" where it has none."""
    found = [
        f"{word} {getattr(meta, name)}"
        for meta in getattr(kind, "__metadata__", ())
        for name, word in LIMITS.items()
        if getattr(meta, name, None) is not None
    ]
    return " and ".join(found)


def type_text(kind: Any, ranges: bool = False) -> str:
    """A type as a message names it, and with ``ranges`` the limits of its numbers."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{type_text(args[0], ranges)} {range_text(kind) * ranges}".strip()
    if origin is Literal:
        return " | ".join(map(str, args))
    texts = ["..." if arg is Ellipsis else type_text(arg, ranges) for arg in args]
    if origin in UNION:
        return " | ".join(texts)
    if origin is tuple:
        return f"[{', '.join(texts)}]"
    return f"{{{': '.join(texts)}}}" if origin else "null" if kind is NoneType else kind.__name__


def shown(value: Any) -> str:
    """A value in a message: as YAML has it, and short."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
