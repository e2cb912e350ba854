"""A frozen leaf on its way through a computation, with its adapter: what the interpreter carries, not an array.

The axes of an array derived from a leaf are followed as tuples of *atoms*. An atom is an axis of the leaf, or a factor
of one that a reshape has split; a reshape that merges axes gives one axis of several atoms. A ``Leaf`` says which atoms
the pair sees as its stack, its rows (in) and its columns (out), so that reshapes and transposes cost nothing: the
arrays of the adapter stay ``lora_a`` (stack..., in, r) and ``lora_b`` (stack..., r, out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stablelora_jax.quantization import dequantize_tree
from stablelora_jax.utils.tree import Path


class Atom(NamedTuple):
    """An axis of a leaf, or a factor of one."""

    axis: int  # of the leaf
    part: tuple[int, ...]  # which factor of it
    size: int


class Leaf(NamedTuple):
    """What is static of a weight."""

    path: Path  # of the leaf in the parameters
    axes: tuple[tuple[Atom, ...], ...]  # of the array as it is now; () is an axis of size 1 that the leaf does not have
    stack: tuple[Atom, ...] = ()  # that index independent pairs; in the order of the adapter's leading axes
    rows: tuple[Atom, ...] = ()  # in this order the axis `in` of lora_a
    columns: tuple[Atom, ...] = ()  # in this order the axis `out` of lora_b

    @property
    def name(self) -> str:
        """Dotted."""
        return ".".join(self.path)


@partial(jax.tree_util.register_dataclass, data_fields=("value", "adapter"), meta_fields=("leaf",))
@dataclass(frozen=True)
class Weight:
    """An array derived from a frozen leaf and the arrays of its adapter."""

    value: Any  # an array, or a quantised leaf that nothing has changed yet
    adapter: Mapping[str, Any]  # {} where only the base is wanted
    leaf: Leaf


def dense(x: Any) -> Any:
    """The array of a weight, dequantised; anything else as it is."""
    return dequantize_tree(x.value) if isinstance(x, Weight) else x


def start(path: Path, value: Any, adapter: Mapping[str, Any], stack: Iterable[int], rows: Iterable[int]) -> Weight:
    """The weight of a whole leaf: ``stack`` and ``rows`` are axes of it, columns the others."""
    atoms = tuple(Atom(axis, (), size) for axis, size in enumerate(value.shape))
    stacked, contracted = tuple(stack), tuple(rows)
    columns = tuple(a for a in atoms if a.axis not in (*stacked, *contracted))
    axes = tuple((atom,) for atom in atoms)
    return Weight(value, adapter, Leaf(path, axes, _pick(atoms, stacked), _pick(atoms, contracted), columns))


def size_of(atoms: Iterable[Atom]) -> int:
    """How many numbers an axis of these atoms has."""
    return math.prod(atom.size for atom in atoms)


def matrix(weight: Weight) -> jax.Array:
    """The array as (stack..., in, out)."""
    leaf = weight.leaf
    order = [*leaf.stack, *leaf.rows, *leaf.columns]
    atoms = [atom for axis in leaf.axes for atom in axis]
    spread = jnp.reshape(dense(weight), [atom.size for atom in atoms])
    moved = jnp.transpose(spread, [atoms.index(atom) for atom in order])
    return moved.reshape(*(a.size for a in leaf.stack), size_of(leaf.rows), size_of(leaf.columns))


def on_stack(weight: Weight, atom: Atom, change: Callable[[Any, int], Any]) -> dict[str, Any]:
    """The adapter with ``change(array, axis)`` made along the stack axis of ``atom``."""
    axis = weight.leaf.stack.index(atom)
    return {name: change(array, axis) for name, array in weight.adapter.items()}


def drop(weight: Weight, atom: Atom) -> Weight:
    """``weight`` without an atom of size 1 that its array has no axis for any more."""
    leaf, adapter = weight.leaf, weight.adapter
    if atom in leaf.stack:
        adapter = on_stack(weight, atom, lambda array, axis: jnp.squeeze(array, axis))
    return Weight(weight.value, adapter, _mapped(leaf, {atom: ()}))


def split(weight: Weight, atom: Atom, first: int) -> tuple[Weight, Atom, Atom]:
    """``weight`` with ``atom`` as two factors, the first of size ``first``."""
    parts = tuple(Atom(atom.axis, (*atom.part, i), size) for i, size in enumerate((first, atom.size // first)))
    adapter = weight.adapter
    if atom in weight.leaf.stack:
        sizes = [part.size for part in parts]
        adapter = on_stack(weight, atom, lambda x, axis: x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))
    return Weight(weight.value, adapter, _mapped(weight.leaf, {atom: parts})), parts[0], parts[1]


def resized(weight: Weight, atom: Atom, size: int, cut: Callable[[Any, int], Any]) -> Weight:
    """``weight`` after ``cut(array, axis)`` has left ``size`` of an atom.

    ``cut`` is made on all arrays of the adapter that have the atom: all of them for an atom of the stack, ``lora_a``
    for one of the rows, those with an axis ``out`` for one of the columns.
    """
    leaf, adapter = weight.leaf, dict(weight.adapter)
    if adapter and atom in leaf.stack:
        adapter = on_stack(weight, atom, cut)
    elif adapter:
        names = ("lora_a",) if atom in leaf.rows else ("lora_b", "lora_magnitude_vector", "lora_bias")
        group = leaf.rows if atom in leaf.rows else leaf.columns
        for name in set(names) & set(adapter):
            adapter[name] = _cut(adapter[name], -2 if name == "lora_a" else -1, group, atom, cut)
    return Weight(weight.value, adapter, _mapped(leaf, {atom: (atom._replace(size=size),)}))


def with_axes(weight: Weight, value: Any, axes: Iterable[tuple[Atom, ...]]) -> Weight:
    """``weight`` whose array is ``value`` with these axes; atoms of size 1 that have none are dropped."""
    axes = tuple(axes)
    kept = {atom for axis in axes for atom in axis}
    for atom in [atom for axis in weight.leaf.axes for atom in axis if atom not in kept]:
        weight = drop(weight, atom)
    return replace(weight, value=value, leaf=weight.leaf._replace(axes=axes))


def transposed(weight: Weight) -> Weight:
    """``weight`` as the product with its transpose sees it: rows and columns, A and B change places."""
    adapter = dict(weight.adapter)
    adapter["lora_a"], adapter["lora_b"] = (jnp.swapaxes(adapter[name], -1, -2) for name in ("lora_b", "lora_a"))
    leaf = weight.leaf
    return replace(weight, adapter=adapter, leaf=leaf._replace(rows=leaf.columns, columns=leaf.rows))


def _cut(array: Any, axis: int, group: tuple[Atom, ...], atom: Atom, cut: Callable[[Any, int], Any]) -> Any:
    """``array`` whose ``axis`` is made of the atoms ``group``, cut along one of them."""
    axis = axis % array.ndim
    spread = array.reshape(*array.shape[:axis], *(a.size for a in group), *array.shape[axis + 1 :])
    done = cut(spread, axis + group.index(atom))
    return done.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


def _pick(atoms: tuple[Atom, ...], axes: tuple[int, ...]) -> tuple[Atom, ...]:
    return tuple(atoms[axis] for axis in axes)


def _mapped(leaf: Leaf, new: Mapping[Atom, tuple[Atom, ...]]) -> Leaf:
    """``leaf`` with atoms replaced by others."""

    def changed(atoms: tuple[Atom, ...]) -> tuple[Atom, ...]:
        return tuple(one for atom in atoms for one in new.get(atom, (atom,)))

    axes = tuple(changed(axis) for axis in leaf.axes)
    return Leaf(leaf.path, axes, changed(leaf.stack), changed(leaf.rows), changed(leaf.columns))
