"""Which axes of a leaf are its stack, its rows and its columns: found from how the model's computation reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from stablelora_jax.lora.trace.context import Context, Use
from stablelora_jax.lora.trace.interpret import Traced
from stablelora_jax.lora.trace.weight import Leaf, start
from stablelora_jax.utils.tree import Path

PRODUCTS = ("dot", "conv", "gather", "ragged_dot")


class Layout(NamedTuple):
    """How a pair sees a leaf."""

    shape: tuple[int, ...]  # of the leaf
    stack_axes: tuple[int, ...]  # that index independent pairs
    in_axes: tuple[int, ...]  # contracted; the others are outputs
    looked_up: bool  # by indices, as an embedding is


def uses_of(traced: Traced, params: Mapping[Path, Any], arrays: Sequence[Any], paths: Sequence[Path]) -> Any:
    """Every :class:`~.context.Use` of the leaves at ``paths``, in the order of the computation: nothing is run.

    Args:
      traced: the model.
      params: all leaves of its parameters by path, in their order.
      arrays: its other inputs.
      paths: of the leaves to follow.
    """
    found: dict[Path, list[Use]] = {path: [] for path in paths}

    def record(leaf: Leaf, use: Use) -> None:
        found[leaf.path].append(use)

    def run(leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
        values = [
            start(path, leaf, {}, (), ()) if path in found else leaf for path, leaf in zip(params, leaves, strict=True)
        ]
        return traced.run(Context(record=record), values, arrays)

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in traced.closed.jaxpr.invars[: len(params)]]
    jax.eval_shape(run, shapes, list(arrays))
    return found


def layout_of(shape: tuple[int, ...], uses: Sequence[Use], depth: int, share_a: bool) -> Layout | str:
    """The layout of a leaf of ``shape``, or why there is none.

    Args:
      shape: of the leaf.
      uses: of it.
      depth: how many leading axes the spec says are a stack.
      share_a: the axes that are batch axes of a product are outputs, so that their pairs share A.
    """
    products = [use for use in uses if use.kind in PRODUCTS and not use.refused]
    if why := next((use.refused for use in uses if use.refused), ""):
        return why
    if not products:
        return "is never multiplied with an activation"
    inner = frozenset().union(*(use.rows for use in products))
    scanned = frozenset().union(*(use.stack for use in uses if not share_a or use.kind == "scan"))
    taken = frozenset().union(*(use.taken for use in uses)) - inner
    stack = scanned | taken | frozenset(range(depth))
    first = next((use for use in products if use.kind == "gather"), products[0])
    rows = first.rows - stack
    columns = frozenset(range(len(shape))) - rows - stack
    if not rows or not columns:
        return "has no axis that a product contracts" if not rows else "has no axis that a product keeps"
    for use in products:
        if use.rows & use.columns:
            return "is reshaped into axes that are partly contracted"
        if _wide(shape, use.rows - stack) not in (_wide(shape, rows), _wide(shape, columns)):
            return "is contracted over other axes in one product than in another"
    return Layout(shape, tuple(sorted(stack)), tuple(sorted(rows)), first.kind == "gather")


def _wide(shape: tuple[int, ...], axes: frozenset[int]) -> frozenset[int]:
    """``axes`` without those of size 1."""
    return frozenset(axis for axis in axes if shape[axis] > 1)
