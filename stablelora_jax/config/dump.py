"""A configuration as YAML, and its keys as a page of help."""

import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, is_dataclass
from itertools import zip_longest
from typing import Any, get_origin

import yaml

from stablelora_jax.config.keys import MAP, choices, default_of, keys_of, names_of, sections, type_text
from stablelora_jax.utils import safe_yaml


class Loader(safe_yaml.Loader):
    """Reads what we write, and nothing that builds objects."""


class Dumper(yaml.SafeDumper):
    """Writes what :class:`Loader` reads."""


for _class in (Loader, Dumper):  # to PyYAML 1e-4 is a string
    _exponent = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+.0123456789"))


def to_dict(config: Any) -> Any:
    """The configuration as plain dicts and lists, keys in the order of the fields."""
    if is_dataclass(config):
        return {name: data_of(getattr(config, name), kind) for name, (_, kind) in keys_of(type(config)).items()}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    return [to_dict(item) for item in config] if isinstance(config, tuple | list) else config


def data_of(value: Any, kind: Any) -> Any:
    """A field's value for YAML: a declared mapping is one even where the dataclass keeps it as a tuple of pairs."""
    pairs = isinstance(value, tuple) and any(get_origin(choice) in MAP for choice in choices(kind))
    return to_dict(dict(value) if pairs else value)


def dump(config: Any) -> str:
    """The configuration as YAML that ``load`` reads back."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False)


def help_text(cls: type) -> str:
    """Every key of ``cls`` with its type, default and meaning, section by section, for a terminal."""
    shown = [group for group in groups(cls, MISSING) if group[1]]
    widest = [max((len(row[i]) for _, rows in shown for row in rows), default=1) for i in range(3)]
    widths = [widest[0], min(widest[1], 26), min(widest[2], 22)]
    widths.append(max(20, 110 - 8 - sum(widths)))
    lines = []
    for title, rows in shown:
        lines += ["", *textwrap.wrap(title, 110)]
        for row in rows:
            cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
            for parts in zip_longest(*cells, fillvalue=""):
                lines.append("".join(f"  {part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines).strip("\n") + "\n"


def groups(cls: Any, default: Any, path: str = "", title: str = "") -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows of key, type, default, meaning) of the section's own keys, then of each section inside it."""
    rows: list[tuple[str, ...]] = []
    inner = []
    for name, (f, kind) in keys_of(cls).items():
        key, meaning = path + name, f.metadata.get("help", "")
        value, members = default_of(f, default if isinstance(default, cls) else None), sections(kind)
        for member in members:
            notes = [f"name: {names_of(member)[0]}"] if len(members) > 1 else []
            notes += ["the default"] if notes and (value is member or isinstance(value, member)) else []
            notes += ["null unless given"] if value is None else []
            heading = f"{key} ({', '.join(notes)})" if notes else key
            inner.append((member, value, f"{key}.", f"{heading}: {meaning}" if meaning else heading))
        if not members:
            shown = "(required)" if value is MISSING else data_of(value, kind)
            text = yaml.dump(shown, Dumper=Dumper, default_flow_style=True, width=sys.maxsize)
            rows.append((key, type_text(kind), text.removesuffix("\n").removesuffix("\n..."), meaning))
    yield title, rows
    for args in inner:
        yield from groups(*args)
