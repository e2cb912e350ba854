"""The keys of a configuration: the fields of a frozen dataclass, with their meaning and their older names."""

import collections.abc
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

UNION, MAP = (Union, UnionType), (dict, collections.abc.Mapping)
REQUIRED: Any = MISSING  # option(REQUIRED, "...") is a key without a default


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
    """A field that is itself a dataclass; ``default`` is the class, or a function that gives the default instance."""
    return field(default_factory=default, metadata={"help": help})


def with_new_names(cls: Any, data: Any) -> Any:
    """``data``, a configuration as an older version dumped it, with the names of today."""
    if not isinstance(data, Mapping):
        return data
    old, made = old_names(cls), {}
    for key, value in data.items():
        key = old.get(key, key)
        if key in keys_of(cls):
            f, kind = keys_of(cls)[key]
            members = sections(kind)
            value = f.metadata.get("renamed", {}).get(as_text(value), value)
            value = with_new_names(members[0], value) if len(members) == 1 else value
        made[key] = value
    return made


def old_names(cls: Any) -> dict[str, str]:
    """What the keys of a section were called in older versions."""
    return {f.metadata["was"]: name for name, (f, _) in keys_of(cls).items() if f.metadata.get("was")}


def as_text(value: Any) -> str | None:
    """``value`` where it is text."""
    return value if isinstance(value, str) else None


def keys_of(cls: Any) -> dict[Any, tuple[Field[Any], Any]]:
    """The fields that can be set, by name, each with its declared type."""
    hints = get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in fields(cls) if f.init}


def names_of(cls: Any) -> tuple[str, ...]:
    """What a section's ``name`` may be."""
    return get_args(keys_of(cls)["name"][1])


def choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in UNION else (kind,)


def sections(kind: Any) -> list[Any]:
    """The dataclasses that a key can be; none when it is a plain value."""
    return [choice for choice in choices(kind) if is_dataclass(choice)]


def default_of(f: Field[Any], instance: Any) -> Any:
    """The value of an absent key: from the section's instance if any; else a value, MISSING, or a class to build."""
    make = f.default_factory
    if instance is not None:
        return getattr(instance, f.name)
    return f.default if make is MISSING else make if is_dataclass(make) else make()


def type_text(kind: Any) -> str:
    """A type as a message names it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, args))
    texts = ["..." if arg is Ellipsis else type_text(arg) for arg in args]
    if origin in UNION:
        return " | ".join(texts)
    if origin is tuple:
        return f"[{', '.join(texts)}]"
    return f"{{{': '.join(texts)}}}" if origin else "null" if kind is NoneType else kind.__name__
