"""Which leaves of a model's parameters existing adapters belong to, where names and shapes alone do not tell the axes.

Paths and sizes of the pairs do tell the leaf; so a table, and a file, need no trace of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import match_target_modules
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

NAMED_BY_MODULE = ("kernel", "embedding", "w", "weight")  # leaves that have their module's name


def fitting_targets(adapters: Any, spec: LoraSpec, params: Mapping[str, Any]) -> dict[Path, TargetModule]:
    """The adapted modules of ``adapters``: by names and shapes of ``params``, or where those do not tell, by the pairs.

    Raises:
      InputError: the adapters do not fit ``params``.
    """
    try:
        return match_target_modules(params, adapters, spec)
    except InputError as error:
        try:
            targets = adapter_target_modules(adapters, spec)
            for path, target in targets.items():
                require_fitting(target, params)
                targets[path] = target._replace(leaf=leaf_name(params, path))
        except InputError:
            raise error from None
        return targets


def leaf_name(params: Mapping[str, Any], path: Path) -> str:
    """The name of the leaf that the pair at ``path`` changes; "" where it is at ``path`` itself."""
    node = tree.get_in(params, path)
    return next((name for name in NAMED_BY_MODULE if name in node), "kernel") if isinstance(node, Mapping) else ""


def require_fitting(target: TargetModule, params: Mapping[str, Any]) -> None:
    """Check that ``params`` have a leaf of the size that the pair at ``target`` is for.

    Raises:
      InputError: they do not; it names the pair.
    """
    node = tree.get_in(params, target.path)
    leaves: list[Any] = [node.get(name) for name in NAMED_BY_MODULE] if isinstance(node, Mapping) else [node]
    sizes = [math.prod(leaf.shape) for leaf in leaves if hasattr(leaf, "shape")]
    if math.prod((*target.stack, *target.size)) not in sizes:
        raise InputError(
            f"{'.'.join(target.path)}: the pair is for a leaf of {(*target.stack, *target.size)}, which these params "
            "do not have there: they are of another model"
        )


def require_unambiguous(targets: Mapping[Path, TargetModule], params: Mapping[str, Any]) -> None:
    """Check that the sizes of each pair leave one way only to divide the axes of its leaf into inputs and outputs.

    Raises:
      InputError: naming a leaf, such as a square one, whose axes only the model's computation tells.
    """
    for target in targets.values():
        shape = tree.get_in(params, target.leaf_path).shape[len(target.stack) :]
        wide = [axis for axis, size in enumerate(shape) if size > 1]
        chosen = [axes for n in range(len(wide) + 1) for axes in itertools.combinations(wide, n)]
        fitting = [axes for axes in chosen if math.prod(shape[axis] for axis in axes) == target.size[0]]
        if len(fitting) > 1:
            raise InputError(f"{'.'.join(target.path)}: {shape} does not tell which axes the model contracts")
