"""Where a spec puts adapters in a tree of parameters, and how a kernel there is read as a matrix.

A kernel may have any number of axes: first those of the stacks that ``LoraSpec.stacked`` names, then some that the
module contracts with its input and some that it adds to its output. Pairs see it as a matrix (in, out). An embedding
(vocabulary, features) is the kernel of a product with one-hot rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.core.meta import AxisMetadata

from stablelora_jax.lora.leaf_checks import require_leaves
from stablelora_jax.lora.leaves import adapter_nodes, trains_pairs
from stablelora_jax.lora.names import first_match, hits, layer_number, matches, require_match, stack_depth, suffixes
from stablelora_jax.lora.pairs import TargetModule, make_target_module, pair_shapes, require_rank
from stablelora_jax.lora.spec import LoraSpec, items, shown
from stablelora_jax.quantization import dequantize_tree, is_quantized
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

LEAVES = ("kernel", "embedding")
MOST = 2**40  # numbers of a stack of pairs


def find_target_modules(params: Any, spec: LoraSpec) -> dict[Path, TargetModule]:
    """Where ``spec`` puts adapters in ``params``; every pattern of the spec must match something.

    Raises:
      InputError: naming the pattern that matches nothing, with near misses.
    """
    params = as_dict(params)
    require_unboxed(params)
    modules = tree.find_dicts(params, lambda node: kernel_leaf(node) is not None)
    targets = {path: _target(path, module, spec) for path, module in modules.items()}
    own_stacks = [".".join(path) for path in targets if path[-1:] and path[-1] in spec.stacked]
    _check_patterns([*(name for target in targets.values() for name in target.names), *own_stacks], spec)
    _check_axes(list(modules), spec)
    return {path: target for path, target in targets.items() if target.rank}


def require_unboxed(params: Any) -> None:
    """Check that no leaf is in a box of Flax's partitioning.

    Raises:
      InputError: one is.
    """
    boxed = [x for x in jax.tree.leaves(params, is_leaf=_is_box) if _is_box(x)]
    if boxed:
        raise InputError(f"parameters are boxed ({type(boxed[0]).__name__}): call flax.linen.unbox(params) first")


def _is_box(x: Any) -> bool:
    return isinstance(x, AxisMetadata)


def match_target_modules(params: Any, adapters: Any, spec: LoraSpec) -> dict[Path, TargetModule]:
    """The target modules of ``params`` under ``spec``, checked against ``adapters``.

    Raises:
      InputError: adapters at a path that the model or the spec does not have, missing ones, or ones of another shape.
    """
    return require_adapters(find_target_modules(params, spec), adapters, spec)


def require_adapters(wanted: dict[Path, TargetModule], adapters: Any, spec: LoraSpec) -> dict[Path, TargetModule]:
    """``wanted``, the target modules of a model, checked against ``adapters``.

    Raises:
      InputError: as :func:`match_target_modules`.
    """
    if not trains_pairs(spec):
        return _require_places(wanted, adapters, spec)
    found = pair_shapes(adapters)
    for path, (stack, rank, size) in found.items():
        if path not in wanted:
            if not make_target_module(path, stack, size, spec).rank:
                raise InputError(f"there are adapters at {'.'.join(path)}, which the spec does not select")
            raise InputError(f"adapters at {'.'.join(path)}, but the model has no kernel there that the spec selects")
        require_rank(wanted[path], rank)
    for path, target in wanted.items():
        if path not in found:
            raise InputError(
                f"{'.'.join(path)} is selected by the spec but has no adapters; make them with init_adapters"
            )
        stack, _, size = found[path]
        if (target.stack, target.size) != (stack, size):
            raise InputError(
                f"{'.'.join(path)}: the kernel is {target.stack + target.size}, "
                f"the adapters are made for {stack + size}"
            )
    return wanted


def _require_places(wanted: dict[Path, TargetModule], adapters: Any, spec: LoraSpec) -> dict[Path, TargetModule]:
    """``wanted``, checked against adapters without trained pairs; of their shapes :func:`.require_leaves` knows."""
    there = adapter_nodes(adapters)
    for path in [*there, *wanted]:
        name = ".".join(path)
        if path not in wanted:
            raise InputError(f"adapters at {name}, but the spec selects no kernel there that the model has")
        if path not in there:
            raise InputError(f"{name} is selected by the spec but has no adapters; make them with init_adapters")
    require_leaves(wanted, adapters, spec)
    return wanted


def kernel_axes(path: Path, module: Mapping[str, Any], spec: LoraSpec) -> tuple[int, tuple[int, ...]]:
    """``(number of stack axes, contracted axes)`` of a module's kernel; contracted axes count from after the stack.

    They come from ``spec.in_axes``, else from the bias, whose shape is the shape of the outputs, else the first axis.
    """
    depth, leaf = stack_depth(path, spec.stacked), module[kernel_leaf(module) or "kernel"]
    depth = depth if len(leaf.shape) >= depth + 2 else 0
    shape, bias = leaf.shape[depth:], module.get("bias")
    name = ".".join(path)
    declared = first_match(items(spec.in_axes), name)
    if declared is not None:
        if not all(0 <= axis < len(shape) for axis in declared) or not 0 < len(declared) < len(shape):
            raise InputError(f"in_axes {declared} do not fit the kernel of {name}, whose axes are {shape}")
        return depth, tuple(declared)
    outputs = len(bias.shape) - depth if bias is not None else len(shape) - 1
    return depth, tuple(range(max(1, len(shape) - outputs)))


def to_matrix(kernel: jax.Array, depth: int, in_axes: tuple[int, ...]) -> jax.Array:
    """``kernel`` with its contracted axes flattened to rows and the others to columns: (stack..., in, out).

    A quantised kernel is dequantised.
    """
    moved = jnp.moveaxis(
        dequantize_tree(kernel), [depth + axis for axis in in_axes], range(depth, depth + len(in_axes))
    )
    rows = int(np.prod(moved.shape[depth : depth + len(in_axes)]))
    return moved.reshape(*moved.shape[:depth], rows, -1)


def target_matrix(params: Any, target: TargetModule) -> jax.Array:
    """The kernel of ``target`` in ``params``, nested dicts, as (stack..., in, out); dequantised."""
    kernel = dequantize_tree(tree.get_in(params, target.leaf_path))
    depth = len(target.stack)
    if target.stack_axes is not None:
        kernel = jnp.moveaxis(kernel, target.stack_axes, range(depth))
    return to_matrix(kernel, depth, target.in_axes)


def with_matrix(params: Any, target: TargetModule, matrix: jax.Array) -> dict[str, Any]:
    """``params`` whose kernel of ``target`` is ``matrix``: the inverse of :func:`target_matrix`."""
    shape, stack_axes = (
        tree.get_in(params, target.leaf_path).shape,
        target.stack_axes or tuple(range(len(target.stack))),
    )
    own = (*target.stack, *(size for axis, size in enumerate(shape) if axis not in stack_axes))
    kernel = from_matrix(matrix, own, len(target.stack), target.in_axes)
    return tree.set_in(params, target.leaf_path, jnp.moveaxis(kernel, range(len(stack_axes)), stack_axes))


def from_matrix(matrix: jax.Array, shape: tuple[int, ...], depth: int, in_axes: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`to_matrix` for a kernel of ``shape``."""
    order = [*in_axes, *(axis for axis in range(len(shape) - depth) if axis not in in_axes)]
    moved = matrix.reshape(*shape[:depth], *(shape[depth + axis] for axis in order))
    return jnp.moveaxis(moved, range(depth, depth + len(in_axes)), [depth + axis for axis in in_axes])


def as_dict(params: Any) -> dict[str, Any]:
    """Plain nested dicts with string keys, from any tree of parameters: ``FrozenDict``, ``nnx.State``, lists, Equinox.

    Of an ``nnx.Module`` they are its ``nnx.Param``.

    Raises:
      InputError: it is no tree.
    """
    if isinstance(params, FrozenDict):
        return unfreeze(params)
    nested: dict[str, Any] = {}
    if _is_plain(params):
        nested = params
        return nested
    for path, leaf in tree.leaves_by_path(own_params(params), _is_whole).items():
        if not path:
            raise InputError(f"params must be a tree of arrays, not {params!r:.60}")
        nested = tree.set_in(nested, path, leaf)
    return nested


def like(params: Any, nested: Mapping[str, Any]) -> Any:
    """``nested``, as :func:`as_dict` gives it, as a tree of the kind of ``params``; of a module, a new module."""
    if isinstance(params, FrozenDict) or _is_plain(params):
        return nested
    own = own_params(params)
    paths = tree.leaves_by_path(own, _is_whole)
    state = tree.with_leaves(own, {path: tree.get_in(nested, path) for path in paths}, _is_whole)
    if own is params:
        return state
    from flax import nnx

    parts: Any = nnx.split(params, nnx.Param, ...)
    return nnx.merge(parts[0], state, parts[2])


def own_params(params: Any) -> Any:
    """``params``, or the parameters of an ``nnx.Module`` as an ``nnx.State``."""
    nnx = sys.modules.get("flax.nnx")  # whoever has a module of it has imported it
    return nnx.state(params, nnx.Param) if nnx is not None and isinstance(params, nnx.Module) else params


def _is_plain(params: Any) -> bool:
    """Whether ``params`` are dicts with string keys all through."""
    if not isinstance(params, dict):
        return False
    return all(
        isinstance(key, str) and (_is_plain(value) if isinstance(value, dict) else _is_whole(value) or _is_array(value))
        for key, value in params.items()
    )


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") or jax.tree_util.treedef_is_leaf(jax.tree.structure(x))


def _is_whole(x: Any) -> bool:
    """A leaf that is a pytree itself: a quantised kernel, or a box."""
    return is_quantized(x) or _is_box(x)


def kernel_leaf(module: Mapping[str, Any]) -> str | None:
    """Which of a module's parameters a pair can change: ``kernel``, ``embedding`` or none."""
    return next((leaf for leaf in LEAVES if len(getattr(module.get(leaf), "shape", ())) >= 2), None)


def _target(path: Path, module: Mapping[str, Any], spec: LoraSpec) -> TargetModule:
    depth, in_axes = kernel_axes(path, module, spec)
    leaf = kernel_leaf(module) or "kernel"
    shape = module[leaf].shape
    rows = math.prod(shape[depth + axis] for axis in in_axes)
    columns = math.prod(size for axis, size in enumerate(shape[depth:]) if axis not in in_axes)
    target = make_target_module(path, shape[:depth], (rows, columns), spec, leaf, in_axes)
    target = target._replace(in_sizes=tuple(shape[depth + axis] for axis in in_axes))
    if target.rank and not rows * columns:
        raise InputError(
            f"{'.'.join(path)}: a kernel of shape {shape} holds nothing to adapt: leave it out of target_modules"
        )
    if target.rank * sum(target.size) * len(target.names) >= MOST:
        raise InputError(f"{'.'.join(path)}: a pair of rank {target.rank} beside a kernel of {shape} fits no memory")
    return target


def _check_axes(paths: list[Path], spec: LoraSpec) -> None:
    names = [".".join(path) for path in paths]
    _require_hits("in_axes", spec.in_axes, names)
    for key in spec.stacked:
        if key != "layers" and not any(key in path for path in paths):
            raise InputError(f"stacked: no module of the model is called {key!r}")


def _check_patterns(names: list[str], spec: LoraSpec) -> None:
    for kind, patterns in (("target_modules", spec.target_modules), ("exclude_modules", spec.exclude_modules)):
        if patterns == "all-linear" and kind == "target_modules":
            continue
        if isinstance(patterns, str):
            require_match(kind, patterns, any(matches(patterns, name) for name in names), names)
            continue
        there = suffixes(names) if patterns else ()
        for pattern in patterns:
            require_match(kind, pattern, pattern in there, names)
    layers = {layer_number(name, spec.stacked) for name in names} if spec.layers_to_transform else ()
    for layer in spec.layers_to_transform or ():
        if layer not in layers:
            raise InputError(f"layers_to_transform: there is no layer {shown(layer)} in the model")
    chosen = [name for name in names if spec.selects(name)]
    if not chosen:
        raise InputError(
            f"the spec selects no module: target_modules {spec.target_modules!r:.200} "
            f"less exclude_modules {spec.exclude_modules!r:.200}"
        )
    for kind, table in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        _require_hits(kind, table, chosen)


def _require_hits(kind: str, table: Any, names: list[str]) -> None:
    keys = [pattern for pattern, _ in items(table)]
    found = hits(keys, names)
    for pattern in keys:
        require_match(kind, pattern, pattern in found, names)
