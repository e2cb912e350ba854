"""The keys of a configuration for a terminal: one screen of all, and a page for each section and key."""

import difflib
import re
import sys
import textwrap
from dataclasses import MISSING
from typing import Any

import yaml

from stablelora_jax.config.dump import Dumper, data_of
from stablelora_jax.config.keys import by_name, keys_of, names_of, sections, type_text
from stablelora_jax.utils.errors import InputError

WIDTH = 100


def help_text(cls: type, section: str | None = None) -> str:
    """The keys of ``cls`` with default and meaning, for a terminal.

    Args:
      cls: the configuration.
      section: None for the top level; ``lora`` for a section's keys; ``optimizer`` for the members of a section that is
        picked by name; ``optimizer.lora_rite`` for the keys of one; ``lora.rank`` or ``steps`` for one key.

    Raises:
      InputError: no such section or key.
    """
    if section is None:
        return _overview(cls)
    pages = _pages(cls)
    if section not in pages:
        near = [page for page, text in pages.items() if f"  {section}: " in text and page.count(".") == 1]
        near = near or difflib.get_close_matches(section[:80], pages, n=1) or [", ".join(keys_of(cls))]
        raise InputError(f"there is no help on {section!r:.80} (did you mean {near[0]}?)")
    return pages[section]


def title_of(cls: Any) -> str:
    """What a section is, in a line: the first of its docstring."""
    return _line(cls.__doc__.split("\n")[0])


def meanings_of(cls: Any) -> dict[str, str]:
    """The meaning of each key: its field's, its annotated type's, or what the docstring says of the argument."""
    import docstring_parser

    said = {part.arg_name: part.description or "" for part in docstring_parser.parse(cls.__doc__ or "").params}
    found = {}
    for key, (f, kind) in keys_of(cls).items():
        described = "".join(getattr(meta, "description", None) or "" for meta in getattr(kind, "__metadata__", ()))
        number = "peak of the schedule" if key.endswith("learning_rate") else "a number"
        text = said.get(key, "").replace("optax schedule", "schedule").replace("scalar or schedule", number)
        found[key] = f.metadata.get("help") or described or _line(text)
    return found


def _line(text: str) -> str:
    """A text of a docstring as one line without markup."""
    return re.sub(r":\w+:`~?|`", "", " ".join(text.split())).replace("None", "null").rstrip(".")


def _overview(cls: Any) -> str:
    plain, inside, meanings = "", "", meanings_of(cls)
    for key, (f, kind) in keys_of(cls).items():
        text = meanings[key] + " (picked by name)" * (len(sections(kind)) > 1)
        start = f"  {key:<15}  "
        if not sections(kind):
            start = f"  {key:<27}  {textwrap.shorten(_default(f, kind), 30, placeholder=' ...'):<13}  "
        line = start + textwrap.shorten(text, max(20, WIDTH - len(start)), placeholder=" ...") + "\n"
        plain, inside = (plain, inside + line) if sections(kind) else (plain + line, inside)
    more = "\nsections; --help NAME shows the keys of one, and --help KEY all about a key:\n" if inside else ""
    return plain + more + inside


def _pages(cls: Any) -> dict[str, str]:
    pages, meanings = {}, meanings_of(cls)
    for key, (f, kind) in keys_of(cls).items():
        members, title = sections(kind), f"{key}: {meanings[key]}"
        if not members:
            pages[key] = _entry(key, f, kind, meanings[key])
        elif len(members) == 1:
            entries = _entries(members[0], key)
            pages |= {key: f"{title}\n\n{''.join(entries.values())}", **entries}
        else:
            usual = {m: " (the default)" for m in members if m is f.default_factory}
            lines = [f"  {', '.join(names_of(m))}: {title_of(m)}{usual.get(m, '')}\n" for m in members]
            pages[key] = f"{title}; picked by {key}.name=NAME; --help {key}.NAME shows the keys\n\n{''.join(lines)}"
            for name, m in by_name(members).items():
                pages[f"{key}.{name}"] = f"{key}.name={name}: {title_of(m)}\n\n{''.join(_entries(m, key).values())}"
    return pages


def _entries(cls: Any, path: str) -> dict[str, str]:
    """Of each key of a section but its name."""
    keys, meanings = keys_of(cls).items(), meanings_of(cls)
    return {f"{path}.{n}": _entry(f"{path}.{n}", *found, meanings[n]) for n, found in keys if n != "name"}


def _entry(key: str, f: Any, kind: Any, meaning: str) -> str:
    head, deep = f"  {key}: {type_text(kind, ranges=True)} = {_default(f, kind)}", " " * 6
    text = textwrap.fill(meaning, WIDTH, initial_indent=deep, subsequent_indent=deep)
    return textwrap.fill(head, WIDTH, subsequent_indent="    ") + f"\n{text}\n"


def _default(f: Any, kind: Any) -> str:
    value = f.default if f.default_factory is MISSING else f.default_factory()
    if value is MISSING:
        return "(required)"
    text = yaml.dump(data_of(value, kind), Dumper=Dumper, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")
