"""Whether adapters hold the leaves that their spec gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from stablelora_jax.lora.leaves import FACTORS, REDRAWN, is_frozen, leaf_shapes
from stablelora_jax.lora.pairs import FULL, TargetModule
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.lora.shared import shared_shapes
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

Shapes = dict[str, tuple[int, ...]]


def require_leaves(targets: Mapping[Path, TargetModule], adapters: Any, spec: LoraSpec) -> None:
    """Check that each adapter, and what they share, holds what the axes of ``spec`` give it, and nothing else.

    Raises:
      InputError: naming a leaf that is missing, unknown or of another shape.
    """
    for path, target in targets.items():
        others = (*FACTORS, FULL, SHARED)  # checked elsewhere
        wanted = {name: shape for name, shape in leaf_shapes(target, spec).items() if name not in others}
        found = {name: jnp.shape(leaf) for name, leaf in tree.get_in(adapters, path).items() if name not in others}
        wanted |= _tied_pairs(tree.get_in(adapters, path), target, spec)
        if wrong := _difference(wanted, found, spec):
            raise InputError(f"{'.'.join(path)}: {wrong}")
    wanted = {".".join(path): shape for path, shape in shared_shapes(targets, spec).items()}
    leaves = tree.leaves_by_path(adapters.get(SHARED, {}))
    if wrong := _difference(wanted, {".".join(path): jnp.shape(leaf) for path, leaf in leaves.items()}, spec):
        raise InputError(f"{SHARED}: {wrong}")


def _difference(wanted: Shapes, found: Shapes, spec: LoraSpec) -> str:
    """What of ``found`` is not as ``wanted``, in words; "" where nothing is.

    Frozen parts that would be drawn again may be carried instead.
    """
    carried = {name for name in set(found) - set(wanted) if is_frozen(name)} if set(wanted) & set(REDRAWN) else set()
    axes = f"parametrization {spec.parametrization!r}"
    axes += f" with init {spec.init!r}" if spec.init != "kaiming" else ""
    if unknown := sorted(set(found) - set(wanted) - carried):
        return f"{unknown[0]} has no meaning for {axes}"
    for name, shape in wanted.items():
        if found.get(name) != shape and not (name in REDRAWN and carried):
            return f"{axes} needs {name} of shape {shape}; it is {found.get(name, 'missing')}"
    return ""


def _tied_pairs(node: Mapping[str, Any], target: TargetModule, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of what a chain of LoRA keeps beside a pair (``rank_allocation/cola.py``): pairs of the same rank."""
    columns = jnp.shape(node["frozen_a"])[-1] if "frozen_a" in node else 0
    if spec.parametrization not in ("lora", "dora") or not columns or columns % target.rank:
        return {}
    rows, outputs = target.size
    return {"frozen_a": (*target.stack, rows, columns), "frozen_b": (*target.stack, columns, outputs)}
