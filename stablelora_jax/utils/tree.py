"""Paths in nested dicts of parameters.

A *path* is the tuple of keys to a module, ``("model", "layers", "self_attn", "q_proj")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

Path = tuple[str, ...]


def keys_of(path: Iterable[Any]) -> Path:
    """A leaf's path as ``jax.tree_util`` gives it, as plain keys: of dicts, lists, attributes."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    """Every leaf of any pytree by its path, in the order of ``jax.tree.flatten``.

    The value of a variable in an ``nnx.State`` has the path of the variable.

    Example::

        >>> leaves_by_path({"layers": [{"w": 1}, {"w": 2}]})
        {('layers', '0', 'w'): 1, ('layers', '1', 'w'): 2}
    """
    inside = type(tree).__module__.startswith("flax.nnx")
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]:
        variable = inside and path and isinstance(path[-1], jax.tree_util.GetAttrKey)
        found[keys_of(path[:-1] if variable else path)] = leaf
    return found


def with_leaves(tree: Any, new: Mapping[Path, Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """``tree`` with the leaves at the paths of ``new`` replaced."""
    leaves = [new.get(path, leaf) for path, leaf in leaves_by_path(tree, is_leaf).items()]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf), leaves)


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
