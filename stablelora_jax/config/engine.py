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

import difflib
import io
import json
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING
from types import NoneType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import yaml

from stablelora_jax.config.dump import Loader, groups, to_dict
from stablelora_jax.config.keys import (
    MAP,
    UNION,
    as_text,
    choices,
    default_of,
    keys_of,
    names_of,
    old_names,
    sections,
    type_text,
    with_new_names,
)
from stablelora_jax.utils import files, safe_yaml
from stablelora_jax.utils.errors import InputError

T = TypeVar("T")
LONG = 500  # characters of a text that a message repeats


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
    data = None if path is None else _parse(_read(path), str(path))
    data = with_new_names(cls, data) if accept_old_names else data
    layers = [] if path is None else [_Layer(str(path), (), data, is_file=True)]
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            _fail(text, "", "an override is KEY=VALUE, such as seed=3")
        layers.append(_Layer(text, tuple(key.strip().split(".")), _parse(value, text), is_file=False))
    made: T = _section(cls, layers, "", MISSING)
    return made


def coerced(config: Any) -> None:
    """Check the values of a dataclass that was made in Python: each is read as from a file, a section from its dict.

    To be called in ``__post_init__``, also of a frozen dataclass.

    Raises:
      InputError: a value of another type, or a section that is neither of its types nor a dict of its keys.
    """
    for name, (f, kind) in keys_of(type(config)).items():
        value = getattr(config, name)
        if not isinstance(value, tuple(sections(kind))):
            made = _value(kind, [_Layer("", (), to_dict(value), is_file=True)], name, default_of(f, None))
            object.__setattr__(config, name, made)


class _Layer(NamedTuple):
    label: str  # as the user wrote it: the file's path, or the whole override
    keys: tuple[str, ...]  # the override's keys still to descend before its value applies
    value: Any
    is_file: bool


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
        return yaml.load(text, Loader=Loader)
    except Exception as error:  # besides YAMLError whatever a forced tag makes PyYAML's constructors raise (!!int x)
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join(filter(None, (getattr(error, part, None) for part in ("context", "problem"))))
        _fail(label, "", f"not valid YAML{line}: {problem or error}")


def _show(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _section(cls: Any, layers: list[_Layer], path: str, default: Any) -> Any:
    """The dataclass ``cls`` from what the layers say, and else from ``default`` where that is one."""
    instance, values = default if isinstance(default, cls) else None, {}
    source = next((layer.label for layer in layers if layer.is_file), "")
    given = _spread(cls, layers, path)
    for name, (f, kind) in keys_of(cls).items():
        key, absent = f"{path}.{name}".lstrip("."), default_of(f, instance)
        if not given[name] and (absent is MISSING or isinstance(absent, type)):
            if not sections(kind) or NoneType in get_args(kind):
                _fail(source, key, f"is missing: set it in the file, or with {key}=VALUE (type {type_text(kind)})")
            given[name] = [_Layer(source, (), {}, is_file=True)]
        values[name] = _value(kind, given[name], key, absent) if given[name] else absent
    try:
        return cls(**values)
    except ValueError as error:
        labels = " ".join(dict.fromkeys(layer.label for layer in layers if layer.label))
        _fail(labels, "", f"{path}: {error}" if path else str(error))


def _spread(cls: Any, layers: list[_Layer], path: str) -> dict[Any, list[_Layer]]:
    """What each layer says about each field of the section."""
    given: dict[Any, list[_Layer]] = {name: [] for name in keys_of(cls)}
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
            new = keys_of(cls)[key][0].metadata.get("renamed", {}).get(as_text(part.value)) if not part.keys else None
            if new:
                _fail(layer.label, f"{path}.{key}".lstrip("."), f"{part.value} is now called {new}")
    return given


def _hint(cls: Any, key: str, path: str) -> str:
    """The key of the section, or of one inside it, that was probably meant; else all keys if they are few."""
    keys = ", ".join(keys_of(cls))
    if key in (old := old_names(cls)):
        return f": it is now called {f'{path}.{old[key]}'.lstrip('.')}"
    every = [*keys_of(cls), *(row[0] for _, rows in groups(cls, MISSING) for row in rows)]
    near = [k for k in every if k.split(".")[-1] == key] or difflib.get_close_matches(key[:80], every, n=1)
    if near:
        return f" (did you mean {f'{path}.{near[0]}'.lstrip('.')}?)"
    return f" ({cls.__name__} has {keys})" if len(keys) <= 240 else " (see the help)"


def _value(kind: Any, layers: list[_Layer], path: str, default: Any = MISSING) -> Any:
    """The value that the layers, of which there is at least one, give to a key of the declared type."""
    members = sections(kind)
    if not members:
        return [_plain(kind, layer, path) for layer in layers][-1]
    if NoneType in get_args(kind):
        if layers[-1].value is None and not layers[-1].keys:
            return None
        layers = [layer for layer in layers if layer.keys or layer.value is not None]
    return _section(members[0], layers, path, default) if len(members) == 1 else _pick(members, layers, path, default)


def _pick(members: list[Any], layers: list[_Layer], path: str, default: Any) -> Any:
    """The member of a union of sections that the last name given picks; layers with another name are dropped."""
    by_name = {name: member for member in members for name in names_of(member)}
    usual = names_of(default)[0] if isinstance(default, type) else getattr(default, "name", MISSING)
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
    wanted, raw = type_text(kind), layer.value
    if layer.keys:
        _fail(layer.label, ".".join([path, *layer.keys]), f"is not a key: set all of {path}, which is {wanted}")
    value = _fit(kind, layer, path)
    if value is MISSING:
        number = type(raw) in (int, float)
        text = str in choices(kind) and (number or isinstance(raw, bool))
        hint = f' (as text: "{_show(raw)}", quotes included)' if text else ""
        _fail(layer.label, path, f"wants {'a finite ' * (kind is float and number)}{wanted}, got {_show(raw)}{hint}")
    return value


def _fit(kind: Any, layer: _Layer, path: str) -> Any:
    """The layer's value as the declared type; MISSING when it is of another type."""
    raw, origin, args = layer.value, get_origin(kind), get_args(kind)

    def part(kind: Any, value: Any, path: str) -> Any:
        return _value(kind, [layer._replace(value=value)], path)

    if origin in UNION:
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
    elif origin in MAP:
        if isinstance(raw, Mapping):
            return {part(args[0], k, f"a key of {path}"): part(args[1], v, f"{path}.{k}") for k, v in raw.items()}
    elif kind not in (bool, int, float, str, NoneType):
        raise TypeError(f"{path}: a configuration cannot have the type {kind}")
    elif kind is float:
        return float(raw) if type(raw) in (int, float) and abs(raw) <= sys.float_info.max else MISSING  # nor nan
    elif type(raw) is kind:
        return raw
    return MISSING
