"""A configuration as YAML."""

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_origin

import yaml

from stablelora_jax.config.keys import MAP, choices, keys_of
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
