"""The trees that an optimizer of pairs takes: with whole pairs in them, and gradients of the same tree."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from stablelora_jax.optimizers.pair_tree import map_pairs, name_of
from stablelora_jax.utils.errors import InputError

SHOWN = 4  # names in a message


def of_pairs(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``tx``, its state and its updates, for trees that it can do its work on.

    Raises:
      InputError: in ``init``, a tree without a whole pair, half a pair, factors that make none or are not floating
        point, leaves that are no arrays; in ``update``, no ``params``, or gradients of another tree or other shapes.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        require_pairs(params)
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise InputError("this optimizer needs the parameters: call update(updates, state, params)")
        require_same_tree(updates, params)
        found: tuple[Any, Any] = inner.update(updates, state, params, **extra)
        return found

    return optax.GradientTransformationExtraArgs(init, update)


def require_pairs(params: Any) -> None:
    """Check that ``params`` holds a whole pair and, besides, nothing but arrays and numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise InputError(f"{name_of(path) or 'the tree'} is {leaf!r:.60}: parameters are arrays")
    found: list[Any] = []
    map_pairs(found.append, params)
    if not found:
        names = [name_of(path) or type(leaf).__name__ for path, leaf in leaves]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
        hidden = "masked or partition hides the rest; " * any(isinstance(node, optax.MaskedNode) for node in nodes)
        raise InputError(
            f"there is no pair to train: a pair is a dict with lora_a (..., in, r) and lora_b (..., r, out); {hidden}"
            f"the tree holds {', '.join(names[:SHOWN]) + more if names else 'nothing'}"
        )


def require_same_tree(updates: Any, params: Any) -> None:
    """Check that ``updates`` is a tree like ``params``, with arrays of the same shapes; None is no gradient."""
    given, wanted = ({name_of(path): leaf for path, leaf in _leaves(tree)} for tree in (updates, params))
    for name in [*given, *wanted]:
        if name not in given or name not in wanted:
            which = "lack" if name not in given else "hold"
            raise InputError(f"the gradients {which} {name or 'a leaf'!s}: they must be a tree like the parameters")
        shapes = [np.shape(tree[name]) for tree in (given, wanted) if tree[name] is not None]
        if len(set(shapes)) > 1:
            raise InputError(f"{name}: a gradient of shape {shapes[0]} for a parameter of shape {shapes[1]}")
    if _structure(updates) != _structure(params):
        raise InputError(
            f"the gradients are a {type(updates).__name__} of another structure than the parameters, "
            f"a {type(params).__name__}: they must be a tree like the parameters"
        )


def _leaves(tree: Any) -> Any:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is None)


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=lambda node: node is None)
