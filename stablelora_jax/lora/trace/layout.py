"""Which axes of a leaf are its stack, its rows and its columns: found from how the model's computation reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from stablelora_jax.lora.trace.context import Context, Use
from stablelora_jax.lora.trace.interpret import Traced
from stablelora_jax.lora.trace.weight import Leaf, start
from stablelora_jax.utils.tree import Path

PRODUCTS = ("dot", "conv", "gather", "ragged_dot", "product")


class Layout(NamedTuple):
    """How a pair sees a leaf."""

    shape: tuple[int, ...]  # of the leaf
    stack_axes: tuple[int, ...]  # that index independent pairs, in the order of the adapter's leading axes
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
        return traced.outputs(Context(record=record), values, arrays)

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
    picked = frozenset().union(*(use.taken for use in uses if use.kind == "take"))
    if picked and any(use.refused for use in uses):  # not kernels that were picked, but rows of a table
        uses = [Use("gather", rows=picked, columns=frozenset(range(len(shape))) - picked)]
    products = [use for use in uses if use.kind in PRODUCTS and not use.refused]
    if why := next((use.refused for use in uses if use.refused), ""):
        return why
    if not products:
        return "is never multiplied with an activation"
    inner = frozenset().union(*(use.rows for use in products))
    stack = _stack(uses, inner, depth, share_a)
    first = next((use for use in products if use.kind == "gather"), products[0])
    rows = first.rows - set(stack)
    columns = frozenset(range(len(shape))) - rows - set(stack)
    if not rows or not columns:
        return "has no axis that a product contracts" if not rows else "has no axis that a product keeps"
    for use in products:
        if use.rows & use.columns:
            return "is reshaped into axes that are partly contracted"
        if _wide(shape, use.rows - set(stack)) not in (_wide(shape, rows), _wide(shape, columns)):
            return "is contracted over other axes in one product than in another"
    return Layout(shape, stack, tuple(sorted(rows)), first.kind == "gather")


def _stack(uses: Sequence[Use], inner: frozenset[int], depth: int, share_a: bool) -> tuple[int, ...]:
    """The axes of the stack: those of scans, outermost first, then batch axes and indices, then as many as are said."""
    scanned = [axis for use in uses if use.kind == "scan" for axis in sorted(use.stack)]
    batch = [axis for use in uses if use.kind != "scan" and not share_a for axis in sorted(use.stack)]
    taken = [axis for use in uses for axis in sorted(use.taken - inner)]
    found = list(dict.fromkeys([*scanned, *sorted({*batch, *taken})]))
    leading = (axis for axis in range(depth + len(found)) if axis not in found)
    while len(found) < depth:
        found.append(next(leading))
    return tuple(found)


def _wide(shape: tuple[int, ...], axes: frozenset[int]) -> frozenset[int]:
    """``axes`` without those of size 1."""
    return frozenset(axis for axis in axes if shape[axis] > 1)
