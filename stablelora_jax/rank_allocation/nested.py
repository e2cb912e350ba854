"""Nested ranks: the first k columns of A and rows of B are themselves an adapter, of rank k, for every k.

Its scale is that of the spec at rank k, ``alpha / k`` for ``scaling: lora``. A module whose own rank is smaller takes
part with all of its ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.pairs import TargetModule, make_target_module
from stablelora_jax.lora.spec import LoraSpec, items
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

NESTED = ("lora", "dora", "adalora")  # column i of A meets row i of B alone
RANK_AXES = {"lora_a": -1, "frozen_a": -1, "lora_b": -2, "frozen_b": -2, "lora_e": -1}
WHY = "orders the ranks of a pair, whose column i of A meets row i of B alone"


@checked
def truncate(adapters: Mapping[str, Any], spec: LoraSpec, rank: int) -> tuple[dict[str, Any], LoraSpec]:
    """``(adapters, spec)`` of the first ``rank`` ranks of every module; what else is trained is kept.

    Args:
      adapters: trained with nested ranks (:func:`.dylora`, :func:`.matryoshka`); of ``lora``, ``dora`` or ``adalora``.
      spec: of the adapters.
      rank: at least 1. Modules of a smaller rank stay as they are.

    Raises:
      InputError: a rank below 1, or a parametrisation whose ranks are not independent.

    Example::

      >>> adapters = {"q_proj": {"lora_a": jnp.ones((6, 4)), "lora_b": jnp.ones((4, 6))}}
      >>> small, spec = truncate(adapters, LoraSpec(rank=4, alpha=8, target_modules=["q_proj"]), 2)
      >>> small["q_proj"]["lora_a"].shape, spec.rank, spec.scale_of("q_proj")
      ((6, 2), 2, 4.0)
    """
    require_nested("truncate", spec)
    cut = at_rank(spec, rank)
    for path, target in adapter_target_modules(adapters, spec).items():
        node, kept = tree.get_in(adapters, path), min(rank, target.rank)
        own = {name: node[name][(..., slice(kept), *[slice(None)] * (-1 - axis))] for name, axis in _axes(node, target)}
        adapters = tree.set_in(adapters, path, {**node, **own})
    return dict(adapters), cut


def at_rank(spec: LoraSpec, rank: int) -> LoraSpec:
    """The spec of the first ``rank`` ranks.

    Raises:
      InputError: ``rank`` is below 1.
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1, not {rank}")
    pattern = {name: min(own, rank) for name, own in items(spec.rank_pattern)}
    return replace(spec, rank=min(spec.rank, rank), rank_pattern=pattern)


def require_nested(name: str, spec: LoraSpec) -> None:
    """Check that the ranks of ``spec`` can be nested.

    Raises:
      InputError: they cannot.
    """
    if spec.parametrization not in NESTED:
        raise InputError(f"{name} {WHY}: it is for parametrization {', '.join(NESTED)}, not {spec.parametrization!r}")


def largest_rank(spec: LoraSpec) -> int:
    """The largest rank that ``spec`` gives a module."""
    most: int = max([spec.rank, *(rank for _, rank in items(spec.rank_pattern))])
    return most


def smallest_rank(spec: LoraSpec) -> int:
    """The smallest rank that ``spec`` gives a module."""
    least: int = min([spec.rank, *(rank for _, rank in items(spec.rank_pattern))])
    return least


def scale_ratios(target: TargetModule, spec: LoraSpec, ranks: Sequence[int]) -> np.ndarray:
    """The scale at each of ``ranks``, of that at the full rank: float64 (ranks, *stack); 0 where nothing is adapted."""
    full = np.array(target.scales)
    rows = [make_target_module(target.path, target.stack, target.size, at_rank(spec, k)).scales for k in ranks]
    ratios = np.array(rows) / np.where(full == 0, 1, full)
    return ratios.reshape(len(ranks), *target.stack)


def weighted(adapters: Any, spec: LoraSpec, weights: Mapping[Path, jax.Array]) -> Any:
    """``adapters`` with the columns of A, and of what stays subtracted from it, times ``weights`` (*stack, rank)."""
    for path, target in adapter_target_modules(adapters, spec).items():
        node = tree.get_in(adapters, path)
        own = {
            name: node[name] * weights[path].astype(node[name].dtype)[..., None, :]
            for name, _ in _axes(node, target)
            if name in ("lora_a", "frozen_a")
        }
        adapters = tree.set_in(adapters, path, {**node, **own})
    return adapters


def _axes(node: Mapping[str, Any], target: TargetModule) -> list[tuple[str, int]]:
    """The leaves at ``target`` that have an axis of ranks, each with that axis."""
    found = [(name, axis) for name, axis in RANK_AXES.items() if name in node]
    for name, axis in found:
        if jnp.shape(node[name])[axis] != target.rank:
            raise InputError(f"{'.'.join(target.path)}: {name} has not the {target.rank} ranks of the pair")
    return found
