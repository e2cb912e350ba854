"""A bank: adapters and their scales, stacked, with room for others of the same modules and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.combine.union import common_target_modules, exactly, plain_target_modules, union_spec
from stablelora_jax.lora.pairs import TargetModule, pairs
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import match_target_modules
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


@dataclasses.dataclass(frozen=True)
class Bank:
    """Adapters by number; a pytree whose ``spec`` is static. Made by :func:`make_bank`."""

    adapters: Any  # as ``spec`` has them, with one more axis in front: (size + 1, stack..., in, rank) and so on
    numbers: Any  # {"lora_scale": (size + 1, stack...)} at every module
    spec: LoraSpec  # of every row: all modules of the bank at its rank

    @property
    def size(self) -> int:
        """Number of adapters, without the base model."""
        return len(jax.tree.leaves(self.numbers)[0]) - 1


jax.tree_util.register_dataclass(Bank, data_fields=["adapters", "numbers"], meta_fields=["spec"])


@checked
def make_bank(
    params: Mapping[str, Any],
    parts: Sequence[tuple[Mapping[str, Any], LoraSpec]],
    *,
    size: int | None = None,
    rank: int | None = None,
) -> Bank:
    """A bank of several adapters of one base, plain LoRA or rsLoRA, of any ranks, scales and targets.

    Args:
      params: the base; only shapes are read.
      parts: ``(adapters, spec)`` of each, numbered from 0. The modules that any of them adapts, in every layer of their
        stacks, are those that the bank can hold.
      size: number of adapters with room; default ``len(parts)``. Unused numbers are the base model.
      rank: the greatest rank that the bank can hold; default the greatest in ``parts``.

    Raises:
      InputError: adapters that do not fit the base, are not plain LoRA, or have no room.
    """
    targets = common_target_modules(parts)
    for i, (adapters, spec) in enumerate(parts):
        try:
            match_target_modules(params, adapters, spec)
        except InputError as error:
            raise InputError(f"adapter {i}: {error}") from None
    known = {path: target for found in targets for path, target in found.items()}
    size = len(parts) if size is None else size
    if size < len(parts):
        raise InputError(f"size={size} has no room for {len(parts)} adapters")
    rank = max(target.rank for found in targets for target in found.values()) if rank is None else rank
    names = sorted(name for target in known.values() for name in target.names)
    united = union_spec([spec for _, spec in parts], dict.fromkeys(names, rank))
    spec = dataclasses.replace(
        united, target_modules=exactly(names), exclude_modules=(), layers_to_transform=None, dropout=0.0
    )
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves([adapters for adapters, _ in parts]))
    shapes = {path: _shapes(target, rank, dtype) for path, target in known.items()}
    slots = [_slot(parts[i][0], found, shapes, f"adapter {i}") for i, found in enumerate(targets)]
    slots += [_slot({}, {}, shapes, "")] * (size + 1 - len(parts))
    adapters, numbers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *slots)
    return Bank(adapters, numbers, spec)


@checked
def replace_adapter(bank: Bank, index: int, adapters: Mapping[str, Any], spec: LoraSpec) -> Bank:
    """``bank`` with other adapters at ``index``: the same shapes, so that nothing compiled for it compiles again.

    Raises:
      InputError: no such number, or adapters that are not plain LoRA, or whose modules or ranks have no room.
    """
    if not 0 <= index < bank.size:
        raise InputError(f"there is no adapter {index} in a bank of {bank.size}: numbers go from 0 to {bank.size - 1}")
    targets = plain_target_modules(adapters, spec, "the new adapter")
    if spec.stacked != bank.spec.stacked:
        raise InputError(f"the new adapter has stacked {spec.stacked}, the bank {bank.spec.stacked}")
    shapes = {
        path: {name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for name, leaf in leaves.items()}
        for path, pair in pairs(bank.adapters).items()
        for leaves in [{**pair, **tree.get_in(bank.numbers, path)}]
    }
    new = _slot(adapters, targets, shapes, "the new adapter")
    held = (bank.adapters, bank.numbers)
    changed, numbers = jax.tree.map(lambda whole, one: whole.at[index].set(one), held, new)
    return Bank(changed, numbers, bank.spec)


def _shapes(target: TargetModule, rank: int, dtype: Any) -> dict[str, Any]:
    """Shapes of a bank's leaves at ``target`` for one adapter."""
    shapes = {"lora_a": (target.size[0], rank), "lora_b": (rank, target.size[1]), "lora_scale": ()}
    return {name: jax.ShapeDtypeStruct(target.stack + shape, dtype) for name, shape in shapes.items()}


def _slot(
    adapters: Any, targets: Mapping[Path, TargetModule], shapes: Mapping[Path, Mapping[str, Any]], label: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pairs and scales of one adapter in the shapes of a bank: zeros where it has none."""
    for path in targets:
        if path not in shapes:
            raise InputError(
                f"{label} adapts {'.'.join(path)}, which the bank does not: make one that begins with both"
            )
    padded: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for path, wanted in shapes.items():
        pair = tree.get_in(adapters, path) if path in targets else {}
        scale = targets[path].scale() if path in targets else jnp.zeros(wanted["lora_scale"].shape)
        numbers = tree.set_in(numbers, path, {"lora_scale": scale})
        where = f"{label}: {'.'.join(path)}"
        leaves = {name: _padded(name, pair.get(name), wanted[name], where) for name in ("lora_a", "lora_b")}
        padded = tree.set_in(padded, path, leaves)
    return padded, numbers


def _padded(name: str, leaf: Any, wanted: Any, label: str) -> jax.Array:
    """``leaf`` with zeros up to the bank's rank, the last axis of A and the last but one of B."""
    if leaf is None:
        return jnp.zeros(wanted.shape, wanted.dtype)
    shape, axis = jnp.shape(leaf), -1 if name == "lora_a" else -2
    padded = list(shape)
    padded[axis] = max(shape[axis], wanted.shape[axis])
    if tuple(padded) != wanted.shape:
        raise InputError(f"{label} has {name} {shape}; the bank has room for {wanted.shape}")
    return jnp.pad(jnp.asarray(leaf, wanted.dtype), [(0, n - m) for n, m in zip(padded, shape, strict=True)])
