"""A model that is read by its computation: where its adapters belong, the low-rank path, merging, a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from stablelora_jax.lora.callables import function_of
from stablelora_jax.lora.dense import changed_kernel, is_dense
from stablelora_jax.lora.dropout import target_keys
from stablelora_jax.lora.fitting import require_fitting
from stablelora_jax.lora.full_parameters import apply_full_parameters, match_trained_parameters
from stablelora_jax.lora.intercept import Observer, adapter_of
from stablelora_jax.lora.leaf_checks import require_leaves
from stablelora_jax.lora.names import matches
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.plain import plain_adapters
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import (
    as_dict,
    like,
    require_adapters,
    require_unboxed,
    target_matrix,
    with_matrix,
)
from stablelora_jax.lora.trace.context import Context
from stablelora_jax.lora.trace.interpret import is_array, trace
from stablelora_jax.lora.trace.layout import Layout
from stablelora_jax.lora.trace.targets import all_layouts, traced_targets
from stablelora_jax.lora.trace.weight import Weight, start
from stablelora_jax.lora.transform import fold
from stablelora_jax.quantization import is_quantized
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


class Subject(Protocol):
    """What is read of an :class:`~stablelora_jax.lora.apply.Adapted`."""

    @property
    def model(self) -> Any: ...  # noqa: D102

    @property
    def spec(self) -> LoraSpec: ...  # noqa: D102

    @property
    def merged(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def observe(self) -> Observer | None: ...  # noqa: D102

    @property
    def found(self) -> dict[Path, TargetModule]: ...  # noqa: D102


def find_targets(lora: Subject, variables: Mapping[str, Any], args: Any, kwargs: Any) -> dict[Path, TargetModule]:
    """Where the spec puts adapters in ``variables["params"]``, by paths.

    Raises:
      InputError: a pattern that matches nothing, or a leaf that no pair can follow.
    """
    params = variables["params"]
    traced, arrays = trace(function_of(lora.model, variables, None), params, (args, kwargs))
    return traced_targets(traced, _leaves(params), arrays, lora.spec, lora.merged)


def apply_traced(
    lora: Subject, variables: Mapping[str, Any], args: Any, kwargs: Any, keys: jax.Array | None, rngs: Any
) -> Any:
    """The model with its low-rank path; ``keys`` are those of dropout, ``rngs`` the model's."""
    params, spec = variables["params"], lora.spec
    traced, arrays = trace(function_of(lora.model, variables, rngs), params, (args, kwargs))
    leaves = _leaves(params)
    adapters = variables["lora"]
    if not _fit(lora, leaves, adapters):
        lora.found.clear()
        lora.found.update(traced_targets(traced, leaves, arrays, spec, lora.merged))
    targets = dict(lora.found)
    require_adapters(targets, adapters, spec)
    if lora.observe is None:  # which may have laid more beside the pairs
        require_leaves(targets, adapters, spec)
    nested = as_dict(params)
    full = match_trained_parameters(nested, adapters, spec)
    plain = plain_adapters(adapters, targets, spec)
    nested = apply_full_parameters(nested, adapters, full, cast=True)
    keys = None if keys is None or (spec.dropout == 0 and "lora_hp" not in variables) else keys
    values = {path: _frozen(path, tree.get_in(nested, path)) for path in leaves}
    for target in targets.values():
        adapter = adapter_of(plain, variables.get("lora_hp"), target, spec, keys is not None)
        if is_dense(spec) or matches(lora.merged, ".".join(target.path)):
            values[target.leaf_path] = _merged(nested, adapter, target, spec)
            continue
        if keys is not None:
            adapter["lora_key"] = target_keys(keys, target)
        values[target.leaf_path] = _weight(tree.get_in(nested, target.leaf_path), adapter, target)
    impl = None if keys is None else jax.random.key_impl(keys)
    context = Context(PARAMETRIZATIONS[spec.parametrization], impl, observe=lora.observe)
    return traced.run(context, list(values.values()), arrays)


def check_traced(lora: Subject, variables: Mapping[str, Any], args: Any, kwargs: Any) -> None:
    """Trace the model with its low-rank path; nothing is run.

    Raises:
      InputError: a leaf is read in a way that no pair of this spec can follow.
    """
    leaves, structure = jax.tree.flatten((variables, args, kwargs))
    arrays = {at: leaf for at, leaf in enumerate(leaves) if is_array(leaf)}

    def run(arrays: Any) -> Any:
        whole = [arrays.get(at, leaf) for at, leaf in enumerate(leaves)]
        variables, args, kwargs = jax.tree.unflatten(structure, whole)
        out = apply_traced(lora, variables, args, kwargs, None, None)
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)]

    jax.eval_shape(run, arrays)


def _fit(lora: Subject, leaves: Mapping[Path, Any], adapters: Any) -> bool:
    """Whether what a trace has found before is about these leaves and adapters."""
    if not lora.found or any(target.leaf_path not in leaves for target in lora.found.values()):
        return False
    try:
        require_adapters(dict(lora.found), adapters, lora.spec)
    except InputError:
        return False
    return True


def merge_traced(lora: Subject, params: Any, adapters: Any, safe: bool) -> Any:
    """``params`` with ``adapters`` folded in at the targets that a trace has found."""
    nested, targets = as_dict(params), dict(lora.found)
    for target in targets.values():
        require_fitting(target, nested)
    require_adapters(targets, adapters, lora.spec)
    full = match_trained_parameters(nested, adapters, lora.spec)
    whole = apply_full_parameters(nested, adapters, full, cast=True)
    return like(params, fold(whole, adapters, targets, lora.spec, 1.0, safe))


def layouts_table(lora: Subject, variables: Mapping[str, Any], args: Any, kwargs: Any) -> str:
    """Every leaf that could be adapted, one line each."""
    params = variables["params"]
    traced, arrays = trace(function_of(lora.model, variables, None), params, (args, kwargs))
    leaves = _leaves(params)
    rows = [("leaf", "shape", "stack", "in", "out", "")]
    for path, (name, layout) in all_layouts(traced, leaves, arrays, lora.spec).items():
        rows.append((name, str(tuple(leaves[path].shape)), *_axes(layout)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _axes(layout: Layout | str) -> tuple[str, str, str, str]:
    """Sizes of the stack, the contracted and the other axes, and how they are read or why they are not."""
    if isinstance(layout, str):
        return "", "", "", layout
    parts = (layout.stack_axes, layout.in_axes)
    out = [axis for axis in range(len(layout.shape)) if axis not in (*parts[0], *parts[1])]
    shown = ["x".join(str(layout.shape[axis]) for axis in axes) or "-" for axes in (*parts, out)]
    return (shown[0], shown[1], shown[2], "looked up" if layout.looked_up else "multiplied")


def _leaves(params: Any) -> dict[Path, Any]:
    require_unboxed(params)
    found = tree.leaves_by_path(params, is_quantized)
    if () in found:
        raise InputError("params must be a tree of named arrays, not one array")
    return found


def _frozen(path: Path, leaf: Any) -> Any:
    """A leaf that has no adapter; a quantised one is dequantised where it is read."""
    return start(path, leaf, {}, (), ()) if is_quantized(leaf) else leaf


def _weight(leaf: Any, adapter: dict[str, Any], target: TargetModule) -> Weight:
    stack = target.stack_axes or ()
    others = [axis for axis in range(len(leaf.shape)) if axis not in stack]
    adapter = {name: jnp.asarray(array) for name, array in adapter.items()}
    return start(target.leaf_path, leaf, adapter, stack, [others[axis] for axis in target.in_axes])


def _merged(nested: Any, adapter: Any, target: TargetModule, spec: LoraSpec) -> jax.Array:
    """The leaf with its change, formed in the step."""
    matrix = target_matrix(nested, target)
    whole = changed_kernel(matrix, adapter, adapter["lora_scale"], spec)
    found: jax.Array = tree.get_in(with_matrix(nested, target, whole), target.leaf_path)
    return found
