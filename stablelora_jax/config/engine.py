"""YAML and command-line overrides -> a frozen dataclass, with every mistake named in one line.

A configuration is a frozen dataclass; a key's type is its annotation, its meaning is in the field::

    @dataclass(frozen=True)
    class Train:
        steps: int = option(1000, "optimizer steps")
        clip: float | None = option(None, "largest gradient norm")
        lora: LoraSpec = section(LoraSpec, "the adapter")
        optimizer: StableLora | AdamW = section(StableLora, "picked by its name")

    config = load(Train, "configs/train.yaml", ["lora.rank=4", "optimizer.name=adamw"])
    print(dump(config), help_text(Train))

Overrides come after the file and the last one wins. A value replaces a value; keys given for a section add to those
already there, except that a new ``name`` drops what the file says about the section under its old name. A union of
plain types takes the first member that fits.
"""

import collections.abc
import difflib
import io
import json
import os
import re
import reprlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields, is_dataclass
from itertools import zip_longest
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from stablelora_jax.utils import files, safe_yaml
from stablelora_jax.utils.errors import InputError

T = TypeVar("T")
_UNION, _MAP = (Union, UnionType), (dict, collections.abc.Mapping)
LONG = 500  # characters of a text that a message repeats
REQUIRED: Any = MISSING  # option(REQUIRED, "...") is a key without a default


def option(default: Any, help: str) -> Any:
    """A dataclass field with its meaning."""
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def section(default: Callable[[], Any], help: str) -> Any:
    """A field that is itself a dataclass; ``default`` is the class, or a function that gives the default instance."""
    return field(default_factory=default, metadata={"help": help})


def load(cls: type[T], path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()) -> T:
    """The configuration ``cls`` from a YAML file (None: all defaults), changed by overrides such as ``lora.rank=4``."""
    layers = [] if path is None else [_Layer(str(path), (), _parse(_read(path), str(path)), is_file=True)]
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            _fail(text, "", "an override is KEY=VALUE, such as seed=3")
        layers.append(_Layer(text, tuple(key.strip().split(".")), _parse(value, text), is_file=False))
    return _section(cls, layers, "", MISSING)


def to_dict(config: Any) -> Any:
    """The configuration as plain dicts and lists, keys in the order of the fields."""
    if is_dataclass(config):
        return {name: _data(getattr(config, name), kind) for name, (_, kind) in _keys(type(config)).items()}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    return [to_dict(item) for item in config] if isinstance(config, tuple | list) else config


def dump(config: Any) -> str:
    """The configuration as YAML that ``load`` reads back."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)


def help_text(cls: type) -> str:
    """Every key of ``cls`` with its type, default and meaning, section by section, for a terminal."""
    groups = [group for group in _groups(cls, MISSING) if group[1]]
    widest = [max((len(row[i]) for _, rows in groups for row in rows), default=1) for i in range(3)]
    widths = [widest[0], min(widest[1], 26), min(widest[2], 22)]
    widths.append(max(20, 110 - 8 - sum(widths)))
    lines = []
    for title, rows in groups:
        lines += ["", *textwrap.wrap(title, 110)]
        for row in rows:
            cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
            for parts in zip_longest(*cells, fillvalue=""):
                lines.append("".join(f"  {part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines).strip("\n") + "\n"


class _Layer(NamedTuple):
    label: str  # as the user wrote it: the file's path, or the whole override
    keys: tuple[str, ...]  # the override's keys still to descend before its value applies
    value: Any
    is_file: bool


class _Loader(safe_yaml.Loader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):  # to PyYAML 1e-4 is a string
    _exponent = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+.0123456789"))


def _fail(label: str, path: str, text: str) -> NoReturn:
    label = label if len(label) <= LONG else f"{label[:LONG]}..."
    line = ": ".join(filter(None, [label, f"{path} {text}".strip()]))
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
        _fail(str(path), "", f"{getattr(error, 'strerror', None) or error}: name a YAML file in UTF-8 that can be read")
    _fail(str(path), "", f"is larger than {safe_yaml.BYTES} bytes, which no configuration is")


def _parse(text: str, label: str) -> Any:
    if len(text) > safe_yaml.BYTES:
        _fail(label, "", f"is longer than {safe_yaml.BYTES} characters, which no configuration is")
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # besides YAMLError whatever a forced tag makes PyYAML's constructors raise (!!int x)
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join(filter(None, (getattr(error, part, None) for part in ("context", "problem"))))
        _fail(label, "", f"not valid YAML{line}: {problem or error}")


def _show(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _type_text(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, args))
    texts = ["..." if arg is Ellipsis else _type_text(arg) for arg in args]
    if origin in _UNION:
        return " | ".join(texts)
    if origin is tuple:
        return f"[{', '.join(texts)}]"
    return f"{{{': '.join(texts)}}}" if origin else "null" if kind is NoneType else kind.__name__


def _keys(cls: Any) -> dict[Any, tuple[Field[Any], Any]]:
    """The fields that can be set, by name, each with its declared type."""
    hints = get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in fields(cls) if f.init}


def _names(cls: Any) -> tuple[str, ...]:
    return get_args(_keys(cls)["name"][1])


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in _UNION else (kind,)


def _sections(kind: Any) -> list[Any]:
    """The dataclasses that a key can be; none when it is a plain value."""
    return [choice for choice in _choices(kind) if is_dataclass(choice)]


def _data(value: Any, kind: Any) -> Any:
    """A field's value for YAML: a declared mapping is one even where the dataclass keeps it as a tuple of pairs."""
    pairs = isinstance(value, tuple) and any(get_origin(choice) in _MAP for choice in _choices(kind))
    return to_dict(dict(value) if pairs else value)


def _default(f: Field[Any], instance: Any) -> Any:
    """The value of an absent key: from the section's instance if any; else a value, MISSING, or a class to build."""
    make = f.default_factory
    if instance is not None:
        return getattr(instance, f.name)
    return f.default if make is MISSING else make if is_dataclass(make) else make()


def _groups(cls: Any, default: Any, path: str = "", title: str = "") -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows of key, type, default, meaning) of the section's own keys, then of each section inside it."""
    rows: list[tuple[str, ...]] = []
    inner = []
    for name, (f, kind) in _keys(cls).items():
        key, meaning = path + name, f.metadata.get("help", "")
        value, members = _default(f, default if isinstance(default, cls) else None), _sections(kind)
        for member in members:
            notes = [f"name: {_names(member)[0]}"] if len(members) > 1 else []
            notes += ["the default"] if notes and (value is member or isinstance(value, member)) else []
            notes += ["null unless given"] if value is None else []
            heading = f"{key} ({', '.join(notes)})" if notes else key
            inner.append((member, value, f"{key}.", f"{heading}: {meaning}" if meaning else heading))
        if not members:
            shown = "(required)" if value is MISSING else _data(value, kind)
            text = yaml.dump(shown, Dumper=_Dumper, default_flow_style=True, width=sys.maxsize)
            rows.append((key, _type_text(kind), text.removesuffix("\n").removesuffix("\n..."), meaning))
    yield title, rows
    for args in inner:
        yield from _groups(*args)


def _section(cls: Any, layers: list[_Layer], path: str, default: Any) -> Any:
    """The dataclass ``cls`` from what the layers say, and else from ``default`` where that is one."""
    instance, values = default if isinstance(default, cls) else None, {}
    source = next((layer.label for layer in layers if layer.is_file), "")
    given = _spread(cls, layers, path)
    for name, (f, kind) in _keys(cls).items():
        key, absent = f"{path}.{name}".lstrip("."), _default(f, instance)
        if not given[name] and (absent is MISSING or isinstance(absent, type)):
            if not _sections(kind) or NoneType in get_args(kind):
                _fail(source, key, f"is missing: set it in the file, or with {key}=VALUE (type {_type_text(kind)})")
            given[name] = [_Layer(source, (), {}, is_file=True)]
        values[name] = _value(kind, given[name], key, absent) if given[name] else absent
    try:
        return cls(**values)
    except ValueError as error:
        labels = " ".join(dict.fromkeys(layer.label for layer in layers if layer.label))
        _fail(labels, "", f"{path}: {error}" if path else str(error))


def _spread(cls: Any, layers: list[_Layer], path: str) -> dict[Any, list[_Layer]]:
    """What each layer says about each field of the section."""
    given: dict[Any, list[_Layer]] = {name: [] for name in _keys(cls)}
    for layer in layers:
        if layer.keys:
            items = {layer.keys[0]: layer._replace(keys=layer.keys[1:])}
        elif isinstance(layer.value, Mapping) or (layer.value is None and layer.is_file):
            items = {key: layer._replace(value=value) for key, value in (layer.value or {}).items()}
        else:
            _fail(layer.label, path or "the top level", f"holds keys ({', '.join(given)}), not {_show(layer.value)}")
        for key, part in items.items():
            if key not in given:
                _fail(layer.label, f"{path}.{key}".lstrip("."), f"is not a key{_hint(cls, str(key), path)}")
            given[key].append(part)
    return given


def _hint(cls: Any, key: str, path: str) -> str:
    """The key of the section, or of one inside it, that was probably meant; else all keys if they are few."""
    keys = ", ".join(_keys(cls))
    every = [*_keys(cls), *(row[0] for _, rows in _groups(cls, MISSING) for row in rows)]
    near = [k for k in every if k.split(".")[-1] == key] or difflib.get_close_matches(key[:80], every, n=1)
    if near:
        return f" (did you mean {f'{path}.{near[0]}'.lstrip('.')}?)"
    return f" ({cls.__name__} has {keys})" if len(keys) <= 240 else " (see the help)"


def _value(kind: Any, layers: list[_Layer], path: str, default: Any = MISSING) -> Any:
    """The value that the layers, of which there is at least one, give to a key of the declared type."""
    members = _sections(kind)
    if not members:
        return [_plain(kind, layer, path) for layer in layers][-1]
    if NoneType in get_args(kind):
        if layers[-1].value is None and not layers[-1].keys:
            return None
        layers = [layer for layer in layers if layer.keys or layer.value is not None]
    return _section(members[0], layers, path, default) if len(members) == 1 else _pick(members, layers, path, default)


def _pick(members: list[Any], layers: list[_Layer], path: str, default: Any) -> Any:
    """The member of a union of sections that the last name given picks; layers with another name are dropped."""
    by_name = {name: member for member in members for name in _names(member)}
    usual = _names(default)[0] if isinstance(default, type) else getattr(default, "name", MISSING)
    names = []
    for layer in layers:
        name = layer.value if layer.keys == ("name",) else usual if layer.is_file else MISSING
        if not layer.keys and isinstance(layer.value, Mapping):
            name = layer.value.get("name", name)
        if name is not MISSING:
            _plain(Literal[tuple(by_name)], layer._replace(keys=(), value=name), f"{path}.name")
        names.append(name)
    picked = next((name for name in reversed(names) if name is not MISSING), usual)
    if picked is MISSING:
        _fail(layers[0].label, f"{path}.name", f"is missing: one of {', '.join(by_name)}")
    kept = [layer for layer, name in zip(layers, names, strict=True) if name in (MISSING, picked)]
    return _section(by_name[picked], [*kept, _Layer("", ("name",), picked, is_file=False)], path, default)


def _plain(kind: Any, layer: _Layer, path: str) -> Any:
    """The layer's value as the declared type, which is not a section."""
    wanted, raw = _type_text(kind), layer.value
    if layer.keys:
        _fail(layer.label, ".".join([path, *layer.keys]), f"is not a key: set all of {path}, which is {wanted}")
    value = _fit(kind, layer, path)
    if value is MISSING:
        number = type(raw) in (int, float)
        text = str in _choices(kind) and (number or isinstance(raw, bool))
        hint = f' (as text: "{_show(raw)}", quotes included)' if text else ""
        _fail(layer.label, path, f"wants {'a finite ' * (kind is float and number)}{wanted}, got {_show(raw)}{hint}")
    return value


def _fit(kind: Any, layer: _Layer, path: str) -> Any:
    """The layer's value as the declared type; MISSING when it is of another type."""
    raw, origin, args = layer.value, get_origin(kind), get_args(kind)

    def part(kind: Any, value: Any, path: str) -> Any:
        return _value(kind, [layer._replace(value=value)], path)

    if origin in _UNION:
        for member in args:
            with suppress(InputError):
                return part(member, raw, path)
    elif origin is Literal:
        return next((arg for arg in args if raw == arg and type(raw) is type(arg)), MISSING)
    elif origin is tuple:
        items = list(map(list, raw.items())) if isinstance(raw, Mapping) and get_origin(args[0]) is tuple else raw
        if isinstance(items, list) and (Ellipsis in args or len(items) == len(args)):
            kinds = args[:1] * len(items) if Ellipsis in args else args
            return tuple(part(kind, items[i], f"{path}[{i}]") for i, kind in enumerate(kinds))
    elif origin in _MAP:
        if isinstance(raw, Mapping):
            return {part(args[0], k, f"a key of {path}"): part(args[1], v, f"{path}.{k}") for k, v in raw.items()}
    elif kind not in (bool, int, float, str, NoneType):
        raise TypeError(f"{path}: a configuration cannot have the type {kind}")
    elif kind is float:
        return float(raw) if type(raw) in (int, float) and abs(raw) <= sys.float_info.max else MISSING  # nor nan
    elif type(raw) is kind:
        return raw
    return MISSING
