"""Experts in PEFT's format: ``target_parameters``, one pair of tensors for all experts of a parameter.

PEFT (0.21, ``lora.ParamWrapper``) adapts a bare parameter of E experts by ``lora_A`` (E r, in), its rows (expert,
rank), and ``lora_B`` (out, r E), its columns (rank, expert). Ours are ``lora_a`` (..., E, in, r) and ``lora_b``
(..., E, r, out) at the path of the leaf. Where a module has several such parameters PEFT wraps its wrappers: the
tensors of the last are ``<module>.lora_A.weight``, those of the one before have ``base_layer`` before ``lora_A``. Their
order is that of registration in PyTorch, which a tree of arrays does not tell: we write those that lead out of the
experts (``down...``, ``w2``, ``wo``) last, as transformers' experts do, and read whichever order fits the shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stablelora_jax.lora.names import matches, module_names, stack_depth
from stablelora_jax.lora.pairs import TargetModule, make_target_module
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

LAST = ("down", "w2", "wo", "out")  # beginnings of the names of what leads out of the experts


class ExpertEntry(NamedTuple):
    """One tensor of a file and its part of a leaf: all experts of one layer."""

    name: str
    shape: tuple[int, int]  # in the file
    path: Path  # of the leaf
    leaf_shape: tuple[int, ...]
    slices: tuple[slice, ...]  # of the leaf (layers x experts, ...): the experts of the layer, the rank in use
    experts: int
    is_a: bool

    def take(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor of the file, from ``leaf``."""
        part = leaf.reshape(-1, *leaf.shape[-2:])[self.slices]  # (experts, in, r) or (experts, r, out)
        moved = part.transpose(0, 2, 1) if self.is_a else part.transpose(2, 1, 0)
        return np.ascontiguousarray(moved.reshape(self.shape))

    def put(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Write the tensor of a file into its part of ``leaf``, in place."""
        if self.is_a:
            part = tensor.reshape(self.experts, -1, tensor.shape[1]).transpose(0, 2, 1)
        else:
            part = tensor.reshape(tensor.shape[0], -1, self.experts).transpose(2, 1, 0)
        leaf.reshape(-1, *leaf.shape[-2:])[self.slices] = part


def is_experts(target: TargetModule, spec: LoraSpec) -> bool:
    """Whether a target is a bare leaf with an axis of experts after those of its layers."""
    return not target.leaf and len(target.stack) == stack_depth(target.path, spec.stacked) + 1


def expert_entries(targets: Iterable[TargetModule], spec: LoraSpec) -> Iterator[ExpertEntry]:
    """Every tensor of the experts among ``targets``.

    Raises:
      InputError: PEFT has no such adapter of experts.
    """
    chosen = [target for target in targets if is_experts(target, spec)]
    if chosen and (spec.parametrization != "lora" or spec.lora_bias):
        raise InputError(f"{'.'.join(chosen[0].path)}: PEFT adapts experts by plain pairs alone")
    modules: dict[Path, list[TargetModule]] = {}
    for target in chosen:
        modules.setdefault(target.path[:-1], []).append(target)
    for group in modules.values():
        for depth, target in enumerate(reversed(sorted(group, key=_order))):
            yield from _entries(target, spec, depth)


def parameter_names(target: TargetModule, spec: LoraSpec) -> list[str]:
    """The names of a target of experts, one for each adapted layer, as PEFT's ``target_parameters`` has them."""
    names = module_names(target.path, target.stack[:-1], spec.stacked)
    ranks = target.ranks[:: target.stack[-1]]
    return [name for name, rank in zip(names, ranks, strict=True) if rank]


def _order(target: TargetModule) -> tuple[bool, str]:
    return target.path[-1].startswith(LAST), target.path[-1]


def _entries(target: TargetModule, spec: LoraSpec, depth: int) -> Iterator[ExpertEntry]:
    (rows, columns), experts = target.size, target.stack[-1]
    shapes = ((*target.stack, rows, target.rank), (*target.stack, target.rank, columns))
    for layer, name in enumerate(module_names(target.path, target.stack[:-1], spec.stacked)):
        rank = target.ranks[layer * experts]
        if not rank:
            continue
        module = name.rpartition(".")[0] + ".base_layer" * depth
        part, used = slice(layer * experts, (layer + 1) * experts), slice(rank)
        a, b = (part, slice(None), used), (part, used, slice(None))
        path = target.path
        yield ExpertEntry(
            f"{module}.lora_A.weight", (experts * rank, rows), (*path, "lora_a"), shapes[0], a, experts, True
        )
        yield ExpertEntry(
            f"{module}.lora_B.weight", (columns, rank * experts), (*path, "lora_b"), shapes[1], b, experts, False
        )


def read_expert_targets(
    raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray], spec: LoraSpec, params: Mapping[str, Any]
) -> dict[Path, TargetModule]:
    """The experts that a PEFT adapter of another program adapts, told from its ``target_parameters`` and shapes.

    Raises:
      InputError: an entry matches no parameter, or tensors fit none.
    """
    found: dict[Path, TargetModule] = {}
    entries = tuple(raw["target_parameters"])
    leaves = {path: leaf for path, leaf in tree.leaves_by_path(params).items() if len(leaf.shape) >= 3}
    for module in {path[:-1] for path in leaves}:
        own = [p for p in leaves if p[:-1] == module and _selected(p, leaves[p].shape, entries, spec)]
        if own:
            found |= _fitting(own, leaves, tensors, spec)
    if not found:
        raise InputError(f"target_parameters {entries!r:.120} match no parameter of experts in this model")
    return found


def _selected(path: Path, shape: tuple[int, ...], entries: Sequence[str], spec: LoraSpec) -> bool:
    depth = stack_depth(path, spec.stacked)
    return len(shape) == depth + 3 and any(matches(entries, n) for n in module_names(path, shape[:depth], spec.stacked))


def _fitting(
    paths: Sequence[Path], leaves: Mapping[Path, Any], tensors: Mapping[str, np.ndarray], spec: LoraSpec
) -> dict[Path, TargetModule]:
    """The targets of one module's parameters, in the order whose shapes the tensors have."""
    ordered = sorted(paths, key=lambda path: (path[-1].startswith(LAST), path[-1]))
    for order in itertools.permutations(ordered):
        targets = {}
        for depth, path in enumerate(reversed(order)):
            shape = leaves[path].shape
            name = module_names(path, shape[:-3], spec.stacked)[0].rpartition(".")[0] + ".base_layer" * depth
            a, b = (tensors.get(f"{name}.lora_{side}.weight") for side in "AB")
            if a is None or b is None or sorted((a.shape[1], b.shape[0])) != sorted(shape[-2:]):
                break
            targets[path] = make_target_module(path, shape[:-2], (a.shape[1], b.shape[0]), spec, "")
        else:
            return targets
    raise InputError(f"no tensors fit the experts {'.'.join(ordered[0])}")


def without_experts(names: Iterable[str], targets: Iterable[TargetModule], spec: LoraSpec) -> list[str]:
    """The entries of ``target_modules`` that name more than experts."""
    rest = [name for target in targets if not is_experts(target, spec) for name in target.names]
    return [entry for entry in names if any(matches((entry,), name) for name in rest)]
