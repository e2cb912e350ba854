"""YAML and command-line overrides -> a frozen dataclass, with every mistake named in one line.

A configuration is a frozen dataclass; a key's type is its annotation, its meaning is in the field::

    @dataclass(frozen=True)
    class Train(Section):
        steps: Annotated[int, Meta(ge=1)] = option(1000, "optimizer steps")
        clip: float | None = option(None, "largest gradient norm")
        lora: LoraSpec = section(LoraSpec, "the adapter")
        optimizer: StableLora | AdamW = section(StableLora, "picked by its name")

    config = load(Train, "configs/train.yaml", ["lora.rank=4", "optimizer.name=adamw"])
    print(dump(config), help_text(Train))

Overrides come after the file and the last one wins. A value replaces a value; keys given for a section add to those
already there, except that a new ``name`` drops what the file says about the section under its old name. Values are
checked by msgspec, strictly: text is no number, and a number no text.
"""

import difflib
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from stablelora_jax.config.dump import Loader
from stablelora_jax.config.keys import (
    KeyProblem,
    by_name,
    checked,
    choices,
    dotted,
    keys_of,
    names_of,
    old_names,
    renamed,
    sections,
    shown,
    type_text,
    with_new_names,
)
from stablelora_jax.utils import files, safe_yaml
from stablelora_jax.utils.errors import InputError

T = TypeVar("T")
LONG = 500  # characters of a text that a message repeats
SOURCES = 160  # characters of a list of file and overrides


class Section:
    """What the dataclasses of a configuration derive from: one made in Python is checked as if it came from a file."""

    def __new__(cls, *_: Any, **given: Any) -> Any:
        """Refuse the names of older versions."""
        for old, name in old_names(cls).items():
            if old in given:
                raise InputError(f"{cls.__name__}: {old} is now called {name}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check each value, and make sections of dicts.

        Raises:
          InputError: a value of another type or out of range, or a section that is not a dict of its keys.
        """
        for name, (f, kind) in keys_of(self.__class__).items():
            object.__setattr__(self, name, _value(f, kind, getattr(self, name), name))


def load(
    cls: type[T],
    path: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    *,
    accept_old_names: bool = False,
) -> T:
    """The configuration ``cls`` from a YAML file (None: all defaults), changed by overrides such as ``lora.rank=4``.

    With ``accept_old_names`` the file may be what an older version has dumped.

    Raises:
      InputError: anything that is not a value of a key; one line that names file and key.
    """
    data = {} if path is None else _parse(_read(path), str(path)) or {}
    data = with_new_names(cls, data) if accept_old_names else data
    labels = {"": "" if path is None else str(path)}
    config = _merged(cls, None, data, labels[""], labels)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            _fail(text, "an override is KEY=VALUE, such as seed=3")
        nested = _parse(value, text)
        for part in reversed(key.strip().split(".")):
            nested = _Dotted({part: nested})
        config = _merged(cls, config, nested, text, labels) if isinstance(config, Mapping) else config
    try:
        made: T = _made(cls, config)
    except KeyProblem as problem:
        _fail(_source(problem.key, labels), str(problem))
    return made


class _Dotted(dict[str, Any]):
    """What the dots of an override's key stand for."""


def _merged(
    kind: Any, old: Any, new: Any, source: str, labels: dict[str, str], path: str = "", usual: Any = None
) -> Any:
    """What is said of a key after a file or an override; ``labels`` gets the source of each value, at "" the file's."""
    members = sections(kind)
    if isinstance(new, _Dotted) and kind and not members:
        _fail(source, f"{path}.{next(iter(new))} is not a key: set all of {path}, which is {type_text(kind)}")
    if not isinstance(new, Mapping) or not (members or isinstance(new, _Dotted)):
        labels[path] = source
        return new
    kinds = {name: found for member in members for name, found in keys_of(member).items()}
    merged = dict(old) if isinstance(old, Mapping) else {}
    if new.get("name", MISSING) not in (MISSING, merged.get("name", usual)) and len(members) > 1:
        merged = {name: value for name, value in merged.items() if labels[f"{path}.{name}"] != labels[""]}
    for name, part in new.items():
        f, kind = kinds.get(name, (None, None))
        if part is not None or source != labels[""] or f is None or not isinstance(f.default_factory, type):
            key = f"{path}.{name}".lstrip(".")
            merged[name] = _merged(kind, merged.get(name), part, source, labels, key, f and _usual(f))
    return merged


def _source(key: str, labels: dict[str, str]) -> str:
    """Where what is said of ``key`` comes from: the override that has set it, or the file and overrides below it."""
    above = [
        text for name, text in labels.items() if name and f"{key}.".startswith((f"{name}.", f"{name}[", f"{name}:"))
    ]
    below = [text for name, text in labels.items() if name.startswith(f"{key}." if key else "")]
    if above:
        return above[-1]
    whole = " ".join(dict.fromkeys(filter(None, [labels[""], *below])))
    return whole if len(whole) <= SOURCES else f"{labels['']} and overrides".removeprefix(" and ")


def _fail(label: str, text: str) -> NoReturn:
    label = label if len(label) <= LONG else f"{label[:LONG]}..."
    line = ": ".join(filter(None, [label, " ".join(text.split())]))
    line = line if len(line) <= 4 * LONG else f"{line[: 2 * LONG]} ... {line[-LONG:]}"
    raise InputError(" ".join(part.strip() for part in line.splitlines()))


def _read(path: str | os.PathLike[str]) -> str:
    try:
        with files.as_path(path, "the configuration").open("rb") as file:
            content = file.read(safe_yaml.BYTES + 1)
        if len(content) <= safe_yaml.BYTES:
            return io.StringIO(content.decode(), newline=None).read()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        _fail(str(path), f"{getattr(error, 'strerror', None) or error}: name a YAML file in UTF-8 that can be read")
    _fail(str(path), f"is larger than {safe_yaml.BYTES} bytes, which no configuration is")


def _parse(text: str, label: str) -> Any:
    if len(text) > safe_yaml.BYTES:
        _fail(label, f"is longer than {safe_yaml.BYTES} characters, which no configuration is")
    try:
        return yaml.load(text, Loader=Loader)
    except Exception as error:  # besides YAMLError whatever a forced tag makes PyYAML's constructors raise (!!int x)
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join(filter(None, (getattr(error, part, None) for part in ("context", "problem"))))
        _fail(label, f"not valid YAML{line}: {problem or error}")


def _hint(cls: Any, key: str, path: str) -> str:
    """The key of the section, or of one inside it, that was probably meant; else all keys if they are few."""
    keys = ", ".join(keys_of(cls))
    if own := {f.metadata.get("peft"): name for name, (f, _) in keys_of(cls).items()}.get(key):
        return f": PEFT's {key} is called {f'{path}.{own}'.lstrip('.')} here"
    if new := old_names(cls).get(key):
        return f": it is now called {f'{path}.{new}'.lstrip('.')}"
    every = list(dotted(cls))
    near = [k for k in every if k.split(".")[-1] == key] or difflib.get_close_matches(key[:80], every, n=1)
    if near:
        return f" (did you mean {f'{path}.{near[0]}'.lstrip('.')}?)"
    return f" ({cls.__name__} has {keys})" if len(keys) <= 240 else " (see the help)"


def _made(cls: Any, data: Any, path: str = "") -> Any:
    """The dataclass ``cls``, which is the section ``path``, from its keys."""
    keys = keys_of(cls)
    if not isinstance(data, Mapping):
        raise KeyProblem(path, f"{path or 'the top level'} holds keys ({', '.join(keys)}), not {shown(data)}")
    try:
        for name, value in data.items():
            if name not in keys:
                raise KeyProblem(str(name), f"{name} is not a key{_hint(cls, str(name), path)}")
            if (new := renamed(keys[name][0], value)) is not value:
                raise KeyProblem(name, f"{name} {value} is now called {new}")
        for name, (f, kind) in keys.items():
            if name not in data and sections(kind) and isinstance(f.default_factory, type):
                data = {**data, name: {}}
            elif name not in data and f.default is MISSING and f.default_factory is MISSING:
                way = f"set it in the file, or with {f'{path}.{name}'.lstrip('.')}=VALUE (type {type_text(kind)})"
                raise KeyProblem(name, f"{name} is missing: {way}")
        return cls(**{name: _value(*keys[name], value, name) for name, value in data.items()})
    except KeyProblem as problem:
        raise (KeyProblem(f"{path}.{problem.key}", f"{path}.{problem}") if path else problem) from None
    except ValueError as error:
        raise KeyProblem(path, f"{path}: {error}" if path else str(error)) from None


def _value(f: Field[Any], kind: Any, value: Any, key: str) -> Any:
    """The value of a key as its declared type; a union of sections is picked by its name."""
    members = sections(kind)
    if not members:
        return checked(kind, value, key)
    if isinstance(value, tuple(members)) or (value is None and NoneType in choices(kind)):
        return value
    if len(members) == 1 or not isinstance(value, Mapping):
        return _made(members[0], value, key)
    named, name = by_name(members), value.get("name", _usual(f))
    checked(Literal[tuple(named)], name, f"{key}.name")
    for given in value:
        others = [names_of(member)[0] for member in members if given in keys_of(member)]
        if others and given not in keys_of(named[name]):
            few = ", ".join(others[:5]) + ", ..." * (len(others) > 5)
            said = f"{key}.{given} is not a key of {key}.name={name}, but of {few}"
            raise KeyProblem(f"{key}.{given}", said)
    return _made(named[name], {**value, "name": name}, key)


def _usual(f: Field[Any]) -> str | None:
    """The name of the section that is the field's default."""
    default = f.default_factory
    return names_of(default)[0] if isinstance(default, type) and "name" in keys_of(default) else None
