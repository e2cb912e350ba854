"""Operations that hand a weight on: each changes the array as it is and says what became of the weight's axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.trace.context import Context, Equation, Use, evaluated, refuse
from stablelora_jax.lora.trace.weight import Atom, Weight, resized, split, with_axes

SCALABLE = {"lora_a", "lora_b", "lora_scale", "lora_key", "lora_dropout"}  # a pair without more beside it


def same(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Casts, copies, barriers and the like: output i is input i with the same axes."""
    del context
    found = evaluated(eqn, values)
    return [
        replace(before, value=after) if isinstance(before, Weight) and after is not None else after
        for before, after in zip(values, found, strict=True)
    ]


def transpose(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Axes in another order."""
    del context
    (weight,) = values
    axes = [weight.leaf.axes[axis] for axis in eqn.params["permutation"]]
    return [with_axes(weight, evaluated(eqn, values)[0], axes)]


def squeeze(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Axes of size 1 go; one that the leaf itself has is a stack of one."""
    (weight,) = values
    gone = eqn.params["dimensions"]
    if context.record is not None:
        for atom in (atom for axis in gone for atom in weight.leaf.axes[axis]):
            context.record(weight.leaf, Use("slice", taken=frozenset((atom.axis,))))
    axes = [atoms for axis, atoms in enumerate(weight.leaf.axes) if axis not in gone]
    return [with_axes(weight, evaluated(eqn, values)[0], axes)]


def broadcast_in_dim(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Further axes of size 1."""
    weight, dims, shape = values[0], eqn.params["broadcast_dimensions"], eqn.params["shape"]
    axes: list[tuple[Atom, ...]] = [()] * len(shape)
    for axis, dim in enumerate(dims):
        axes[dim] = weight.leaf.axes[axis]
    if list(weight.value.shape) != [shape[dim] for dim in dims]:
        return refuse(context, eqn, values, "is broadcast along an axis")
    if any(size != 1 and dim not in dims for dim, size in enumerate(shape)):
        return refuse(context, eqn, values, "is broadcast along a new axis")
    return [with_axes(weight, evaluated(eqn, values)[0], axes)]


def reshape(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Axes merged, or split into factors."""
    weight: Weight = values[0]
    if eqn.params.get("dimensions") is not None:
        return refuse(context, eqn, values, "is reshaped in another order")
    value, axes, at = evaluated(eqn, values)[0], [], 0
    for size in eqn.params["new_sizes"]:
        taken: list[Atom] = []
        left = size
        while left > 1 or (not taken and size == 1 and _size_at(weight, at) == 1):
            atom = _atoms(weight)[at]
            if atom.size > left and atom.size % left == 0:
                weight, atom, _ = split(weight, atom, left)
            if left % atom.size:
                return refuse(context, eqn, values, "is reshaped across its axes")
            taken.append(atom)
            left //= atom.size
            at += 1
        axes.append(tuple(taken))
    return [with_axes(weight, value, axes)]


def _atoms(weight: Weight) -> list[Atom]:
    return [atom for axis in weight.leaf.axes for atom in axis]


def _size_at(weight: Weight, at: int) -> int | None:
    atoms = _atoms(weight)
    return atoms[at].size if at < len(atoms) else None


def _cut_axes(
    context: Context,
    eqn: Equation,
    values: Sequence[Any],
    value: Any,
    cuts: Mapping[int, tuple[int, Callable[..., Any]]],
) -> Any:
    """The weight whose array is ``value`` after cuts, ``{axis: (new size, cut(array, axis))}``; None if refused."""
    weight: Weight = values[0]
    for axis, (size, cut) in cuts.items():
        atoms = weight.leaf.axes[axis]
        wide = [atom for atom in atoms if atom.size > 1]
        if not wide and size == 1:
            continue
        if len(wide) != 1:
            return None
        (atom,) = wide
        if "lora_magnitude_vector" in weight.adapter and atom in weight.leaf.rows and size != atom.size:
            return None
        weight = resized(weight, atom, size, cut)
    return with_axes(weight, value, weight.leaf.axes)


def rev(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Axes reversed, as in a transposed convolution."""
    value, dims = evaluated(eqn, values)[0], eqn.params["dimensions"]
    found = _cut_axes(context, eqn, values, value, {axis: (value.shape[axis], jnp.flip) for axis in dims})
    return [found] if found is not None else refuse(context, eqn, values, "is reversed across its axes")


def slice_(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """A range of each axis, known when traced."""
    shape = values[0].value.shape
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    step = eqn.params["strides"] or (1,) * len(shape)
    value, cuts = evaluated(eqn, values)[0], {}
    for axis, size in enumerate(shape):
        if (start[axis], limit[axis], step[axis]) != (0, size, 1):
            cut = partial(_sliced, start=start[axis], limit=limit[axis], step=step[axis])
            cuts[axis] = (value.shape[axis], cut)
    found = _cut_axes(context, eqn, values, value, cuts)
    return [found] if found is not None else refuse(context, eqn, values, "is sliced across its axes")


def _sliced(array: Any, axis: int, start: int, limit: int, step: int) -> Any:
    return jax.lax.slice_in_dim(array, start, limit, step, axis)


def dynamic_slice(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """A range of each axis, its start known when run."""
    weight, starts = values[0], values[1:]
    if any(isinstance(start, Weight) for start in starts):
        return refuse(context, eqn, values, "is used as an index")
    value, cuts = evaluated(eqn, values)[0], {}
    for axis, size in enumerate(weight.value.shape):
        if value.shape[axis] != size:
            cut = partial(_dynamically_sliced, start=starts[axis], size=value.shape[axis])
            cuts[axis] = (value.shape[axis], cut)
    found = _cut_axes(context, eqn, values, value, cuts)
    return [found] if found is not None else refuse(context, eqn, values, "is sliced across its axes")


def _dynamically_sliced(array: Any, axis: int, start: Any, size: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def split_(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Several ranges of one axis."""
    axis, sizes, found, at = eqn.params["axis"], eqn.params["sizes"], [], 0
    for size, value in zip(sizes, evaluated(eqn, values), strict=True):
        cut = partial(_sliced, start=at, limit=at + int(size), step=1)
        at += int(size)
        one = value if value is None else _cut_axes(context, eqn, values, value, {axis: (int(size), cut)})
        if one is None and value is not None:
            return refuse(context, eqn, values, "is split across its axes")
        found.append(one)
    return found


def unstack(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Every index of one axis."""
    (weight,), axis = values, eqn.params["axis"]
    axes = [atoms for other, atoms in enumerate(weight.leaf.axes) if other != axis]
    found = []
    for at, value in enumerate(evaluated(eqn, values)):
        cut = partial(_sliced, start=at, limit=at + 1, step=1)
        one = value if value is None else _cut_axes(context, eqn, values, value, {axis: (1, cut)})
        if one is None and value is not None:
            return refuse(context, eqn, values, "is split across its axes")
        found.append(one if one is None else with_axes(one, value, axes))
    if context.record is not None:
        context.record(weight.leaf, Use("slice", taken=frozenset(atom.axis for atom in weight.leaf.axes[axis])))
    return found


def scaled(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """A product with, or a division by, a number."""
    weights = [value for value in values if isinstance(value, Weight)]
    numbers = [value for value in values if not isinstance(value, Weight)]
    divides = eqn.primitive.name == "div"
    if len(weights) != 1 or any(jnp.size(x) != 1 for x in numbers) or (divides and values[0] is not weights[0]):
        return refuse(context, eqn, values, f"enters a {eqn.primitive.name} with another array")
    (weight,) = weights
    value, adapter = evaluated(eqn, values)[0], dict(weight.adapter)
    if value.shape != weight.value.shape:
        return refuse(context, eqn, values, f"enters a {eqn.primitive.name} that adds axes")
    if set(adapter) - SCALABLE:
        return refuse(context, eqn, values, "is multiplied by a number and trains more than a pair (DoRA, lora_bias)")
    if adapter:
        number = jnp.reshape(numbers[0], ()).astype(adapter["lora_scale"].dtype) if numbers else -1.0
        adapter["lora_scale"] = adapter["lora_scale"] / number if divides else adapter["lora_scale"] * number
    return [Weight(value, adapter, weight.leaf)]


RULES: dict[str, Any] = {
    **dict.fromkeys(
        ("convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "optimization_barrier")
        + ("device_put", "pvary", "pcast", "reshard", "mesh_cast", "stop_gradient", "name"),
        same,
    ),
    "transpose": transpose,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "rev": rev,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "split": split_,
    "unstack": unstack,
    **dict.fromkeys(("mul", "div", "neg"), scaled),
}
ALONE = {"transpose", "squeeze", "broadcast_in_dim", "reshape", "slice", "dynamic_slice", "split", "unstack", "rev"}
