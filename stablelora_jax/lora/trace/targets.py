"""Where a spec puts adapters in a model that is read by tracing: leaves by name, axes by what the computation does.

A leaf called ``kernel``, ``embedding``, ``w`` or ``weight`` has its module's name and its pair at its module's path;
any other leaf (``gating_einsum``, the bare weights of experts) has its own name and path. Patterns select by these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from stablelora_jax.lora.fitting import NAMED_BY_MODULE
from stablelora_jax.lora.names import first_match, hits, matches, require_match, stack_depth, suffixes, unindexed
from stablelora_jax.lora.pairs import TargetModule, make_target_module
from stablelora_jax.lora.spec import LoraSpec, items
from stablelora_jax.lora.trace.context import Use
from stablelora_jax.lora.trace.interpret import Traced
from stablelora_jax.lora.trace.layout import PRODUCTS, Layout, layout_of, uses_of
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


def pair_paths(leaves: Mapping[Path, Any]) -> dict[Path, Path]:
    """For each leaf that a pair could change, by path, the path of its pair: float leaves of at least two axes."""
    wide = [path for path, leaf in leaves.items() if len(getattr(leaf, "shape", ())) >= 2]
    wide = [path for path in wide if jnp.issubdtype(leaves[path].dtype, jnp.floating)]
    named = [path[:-1] for path in wide if path[-1] in NAMED_BY_MODULE]
    alone = {module for module in named if module and named.count(module) == 1}
    return {p: p[:-1] if p[-1] in NAMED_BY_MODULE and p[:-1] in alone else p for p in wide}


def traced_targets(
    traced: Traced, leaves: Mapping[Path, Any], arrays: Sequence[Any], spec: LoraSpec, merged: Sequence[str] = ()
) -> dict[Path, TargetModule]:
    """The target modules of ``spec``, by the paths of their pairs.

    Args:
      traced: the model.
      leaves: of its parameters, by path.
      arrays: its other inputs.
      spec: what to adapt.
      merged: endings of names of leaves that are merged inside ``apply``, so that any operation may read them.

    Raises:
      InputError: a pattern that matches nothing, or a leaf that no pair can follow.
    """
    places = pair_paths(leaves)
    names = {path: ".".join(place) for path, place in places.items()}
    free = replace(spec, layers_to_transform=None)
    numbered = any(part.isdigit() for entry in _lists(spec) for part in entry.split("."))  # layers are named one by one
    chosen = [path for path, name in names.items() if numbered or free.selects(name) or _is_expression(spec)]
    targets, seen = {}, set(names.values())
    for path, uses in uses_of(traced, leaves, arrays, chosen).items():
        by_merging, name = matches(tuple(merged), names[path]), names[path]
        layout = _layout(name, leaves[path].shape, uses, spec, by_merging)
        if isinstance(layout, str):
            if not free.selects(name) or _passed_over(spec, path, uses):
                continue
            raise InputError(
                f"{name} {layout}: put it in exclude_modules"
                + f", or have it merged inside apply: adapted(model, spec, merged=({name!r},))" * bool(uses)
            )
        target = _target(path, places[path], layout, spec)
        seen |= set(target.names)
        if target.rank:
            targets[places[path]] = target
    _check(spec, sorted(seen), targets)
    return targets


def all_layouts(
    traced: Traced, leaves: Mapping[Path, Any], arrays: Sequence[Any], spec: LoraSpec
) -> dict[Path, tuple[str, Layout | str]]:
    """Every leaf that a pair could change: its name, and its layout or why it has none."""
    names = {path: ".".join(place) for path, place in pair_paths(leaves).items()}
    uses = uses_of(traced, leaves, arrays, list(names))
    return {path: (names[path], _layout(names[path], leaves[path].shape, uses[path], spec, False)) for path in names}


def _layout(name: str, shape: tuple[int, ...], uses: Sequence[Use], spec: LoraSpec, by_merging: bool) -> Layout | str:
    stacked = [key for key in spec.stacked if key != "layers"]  # the default says nothing of this model
    depth = stack_depth(tuple(name.split(".")), stacked)
    if by_merging:
        uses = [use for use in uses if not use.refused]
        if not any(use.kind in PRODUCTS for use in uses):
            depth = max([depth, *(axis + 1 for use in uses for axis in use.stack)])
            return Layout(shape, tuple(range(depth)), first_match(items(spec.in_axes), name, (depth,)), False)
    declared: Any = first_match(items(spec.in_axes), name)
    if declared is None:
        return layout_of(shape, uses, depth, False)
    both = [layout_of(shape, uses, depth, share_a) for share_a in (True, False)]
    found = [layout for layout in both if not isinstance(layout, str)]
    fitting = [layout for layout in found if _own(layout) == tuple(declared)]
    if fitting or not found:
        return fitting[0] if fitting else both[0]
    return f"is contracted over its axes {_own(found[-1])}, and in_axes of the spec says {tuple(declared)}"


def _own(layout: Layout) -> tuple[int, ...]:
    """The contracted axes, not counting those of the stack."""
    return tuple(axis - sum(stack < axis for stack in layout.stack_axes) for axis in layout.in_axes)


def _target(path: Path, place: Path, layout: Layout, spec: LoraSpec) -> TargetModule:
    shape, (stack, rows) = layout.shape, (layout.stack_axes, layout.in_axes)
    size = (
        math.prod(shape[axis] for axis in rows),
        math.prod(size for axis, size in enumerate(shape) if axis not in (*stack, *rows)),
    )
    leaf = path[-1] if len(place) < len(path) else ""
    found = make_target_module(place, tuple(shape[a] for a in stack), size, spec, leaf, _own(layout), layout.looked_up)
    return found._replace(stack_axes=stack, in_sizes=tuple(shape[axis] for axis in rows))


def _lists(spec: LoraSpec) -> list[str]:
    """The entries of the spec's lists of names."""
    given = (spec.target_modules, spec.exclude_modules)
    return [entry for entries in given if isinstance(entries, tuple) for entry in entries]


def _is_expression(spec: LoraSpec) -> bool:
    return isinstance(spec.target_modules, str) and spec.target_modules != "all-linear"


def _passed_over(spec: LoraSpec, path: Path, uses: Sequence[Use]) -> bool:
    """Whether a leaf without a layout is only not selected: expressions mean leaves that are multiplied."""
    embeds = path[-1].endswith("embedding") or any(use.kind == "gather" for use in uses)
    if spec.target_modules == "all-linear" and embeds:
        return True
    return isinstance(spec.target_modules, str) and not any(use.kind in PRODUCTS for use in uses)


def _check(spec: LoraSpec, names: Sequence[str], targets: Mapping[Path, TargetModule]) -> None:
    """Check that every pattern matches something and that no pair is inside another."""
    there = suffixes(names)
    for entry in _lists(spec):
        kind = "target_modules" if entry in spec.target_modules else "exclude_modules"
        require_match(kind, entry, entry in there, names)
    if not targets:
        layers = f" in layers_to_transform {spec.layers_to_transform}" if spec.layers_to_transform is not None else ""
        raise InputError(
            f"the spec selects no leaf that the model multiplies: target_modules {spec.target_modules!r:.200}{layers}"
        )
    chosen = [unindexed(name) for target in targets.values() for name in target.names]
    for kind, table in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        keys = [key for key, _ in items(table)]
        for key in keys:
            require_match(kind, key, key in hits(keys, chosen), chosen)
    for path in targets:
        for above in (path[:i] for i in range(len(path))):
            if above in targets:
                raise InputError(
                    f"{'.'.join(above)} and {'.'.join(path)} are adapted, one inside the other: exclude one"
                )
