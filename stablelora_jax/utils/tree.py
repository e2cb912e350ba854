"""Paths in nested dicts of parameters.

A *path* is the tuple of keys to a module, ``("model", "layers", "self_attn", "q_proj")``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[str, ...]


def keys_of(path: Iterable[Any]) -> Path:
    """A leaf's path as ``jax.tree_util`` gives it, as plain keys."""
    return tuple(str(getattr(key, "key", key)) for key in path)


def find_dicts(tree: Any, wanted: Any, prefix: Path = ()) -> dict[Path, Mapping[str, Any]]:
    """Every dict in ``tree`` for which ``wanted(dict)`` holds, by path, sorted; inside a find nothing is searched."""
    if not isinstance(tree, Mapping):
        return {}
    if wanted(tree):
        return {prefix: tree}
    found: dict[Path, Mapping[str, Any]] = {}
    for key in sorted(tree):
        found |= find_dicts(tree[key], wanted, (*prefix, key))
    return found


def set_in(tree: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """A copy of ``tree`` with ``value`` at ``path``; only the dicts on the way are copied, missing ones are made."""
    if not path:
        found: dict[str, Any] = value
        return found
    return {**tree, path[0]: set_in(tree.get(path[0], {}), path[1:], value)}


def get_in(tree: Any, path: Path) -> Any:
    """The node of ``tree`` at ``path``, or None where there is none."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree
