"""The operations that multiply a weight with an activation: what they contract, and their low-rank paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.intercept import SCOPE, add
from stablelora_jax.lora.trace.context import Context, Equation, Use, axes_of, evaluated, refuse, refused
from stablelora_jax.lora.trace.low_rank import dropped_input, gain_of, product, up
from stablelora_jax.lora.trace.weight import Atom, Weight, size_of, taken, with_axes


def dot_general(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jnp.dot``, ``matmul``, ``einsum`` and ``tensordot``."""
    if all(isinstance(value, Weight) for value in values):
        return refuse(context, eqn, values, "is multiplied with another parameter")
    side = 0 if isinstance(values[0], Weight) else 1
    weight, x = values[side], values[1 - side]
    contract, batch = eqn.params["dimension_numbers"]
    of_weight = [weight.leaf.axes[axis] for axis in contract[side]]
    pairs = dict(zip((*contract[1 - side], *batch[1 - side]), (*contract[side], *batch[side]), strict=True))
    of_x = [weight.leaf.axes[pairs[axis]] if axis in pairs else (("x", axis),) for axis in range(jnp.ndim(x))]
    free_w = [weight.leaf.axes[a] for a in range(len(weight.value.shape)) if a not in (*contract[side], *batch[side])]
    free_x = [labels for axis, labels in enumerate(of_x) if axis not in pairs]
    of_y = [weight.leaf.axes[axis] for axis in batch[side]] + (free_w + free_x if side == 0 else free_x + free_w)
    if context.record is not None:
        stack = _axes([weight.leaf.axes[axis] for axis in batch[side]])
        context.record(weight.leaf, Use("dot", stack, rows=_axes(of_weight), columns=_axes(free_w)))
    if not weight.adapter:
        return evaluated(eqn, values)

    def base(x: jax.Array) -> Any:
        return evaluated(eqn, (weight, x) if side == 0 else (x, weight))[0]

    return [product(context, weight, x, of_x, of_y, base)]


def conv_general_dilated(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Convolutions: A is a kernel with r outputs, B a product at each position."""
    x, weight = values
    params, rhs = eqn.params, eqn.params["dimension_numbers"].rhs_spec
    if isinstance(x, Weight) or not isinstance(weight, Weight):
        return refuse(context, eqn, values, "is convolved as if it were an activation")
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return refuse(context, eqn, values, "is read by a grouped convolution")
    axes = weight.leaf.axes
    rows = [axes[axis] for axis in range(len(axes)) if axis != rhs[0]]
    if context.record is not None:
        context.record(weight.leaf, Use("conv", rows=_axes(rows), columns=axes_of(axes[rhs[0]])))
    if not weight.adapter:
        return evaluated(eqn, values)
    if weight.leaf.stack or {a for axis in rows for a in axis} != set(weight.leaf.rows):
        refused(weight.leaf, "is contracted over other axes than its adapters were made for")
    features, own = params["dimension_numbers"].out_spec[1], weight.adapter
    a = _as_kernel(weight, rhs[0])
    dropped, y = dropped_input(context, weight, x), evaluated(eqn, values)[0]
    with jax.named_scope(SCOPE):
        z = eqn.primitive.bind(dropped, a.astype(x.dtype), **params)
        change = jnp.moveaxis(up(context, jnp.moveaxis(z, features, -1).astype(x.dtype), own), -1, features)
    return [_with_gain(context, weight, eqn, (dropped, weight), y, change, features, dropped is x)]


def _as_kernel(weight: Weight, features: int) -> jax.Array:
    """``lora_a`` (in, r) with the axes of the convolution's kernel, r in the place of its outputs."""
    leaf = weight.leaf
    a = weight.adapter["lora_a"].reshape(*(atom.size for atom in leaf.rows), -1)
    order = [leaf.rows.index(atom) if axis != features else len(leaf.rows) for axis, atom in _each(leaf, features)]
    shape = [a.shape[-1] if axis == features else size_of(atoms) for axis, atoms in enumerate(leaf.axes)]
    return jnp.transpose(a, order).reshape(shape)


def _each(leaf: Any, features: int) -> list[tuple[int, Any]]:
    """``(axis, atom)`` in the order of the kernel; the axis of the outputs once."""
    return [(axis, atom) for axis, atoms in enumerate(leaf.axes) for atom in ((None,) if axis == features else atoms)]


def _with_gain(
    context: Context, weight: Weight, eqn: Any, dropped: Any, y: Any, change: Any, axis: int, plain: bool
) -> jax.Array:
    """The sum of ``y`` and its change, where the parametrisation may have a gain for each output, along ``axis``."""
    gain = gain_of(context, weight)
    if gain is None:
        return add(y, change, True)
    gain = jnp.expand_dims(gain, [i for i in range(y.ndim) if i != axis])
    inner = y if plain else evaluated(eqn, dropped)[0]
    return add(y, (gain - 1) * inner.astype(gain.dtype) + gain * change, True)


def gather(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """A look-up of rows: ``A[ids] B``."""
    weight, ids = values
    axis = None if isinstance(ids, Weight) else _looked_up(eqn, weight.value.shape)
    if axis is None:
        return refuse(context, eqn, values, "is indexed along several axes, or in part")
    axes, leaf, numbers = weight.leaf.axes, weight.leaf, eqn.params["dimension_numbers"]
    if len(axes) > 2 and (context.record is not None or set(axes[axis]) & set(leaf.stack)):
        return [_taken(context, weight, ids, eqn, values, axis)]
    rest = [atoms for other, atoms in enumerate(axes) if other != axis]
    if context.record is not None:
        context.record(leaf, Use("gather", rows=axes_of(axes[axis]), columns=_axes(rest)))
    y = evaluated(eqn, values)[0]
    if not weight.adapter:
        return [y]
    if leaf.stack or tuple(axes[axis]) != leaf.rows:
        refused(leaf, "is looked up along another axis than its adapters were made for")
    own, batch, column = weight.adapter, ids.ndim - 1, numbers.start_index_map.index(axis)
    with jax.named_scope(SCOPE):
        pick = jax.lax.GatherDimensionNumbers((batch,), (0,), (0,))
        a, rows = own["lora_a"].astype(y.dtype), ids[..., column : column + 1]
        z = jax.lax.gather(a, rows, pick, (1, a.shape[-1]), mode=eqn.params["mode"], fill_value=0)
        change = up(context, z, own)
    # the axes of y as batch, then those of the leaf; so that the features can be reordered
    inner = jnp.moveaxis(y, numbers.offset_dims, range(batch, y.ndim))
    order = [leaf.columns.index(atom) for atoms in rest for atom in atoms]
    sizes = [atom.size for atom in leaf.columns]

    def as_output(change: jax.Array) -> jax.Array:
        lead = change.shape[:-1]
        spread = change.reshape(*lead, *sizes).transpose(*range(len(lead)), *(len(lead) + i for i in order))
        return spread.reshape(*lead, *inner.shape[batch:])

    change, gain = as_output(change), gain_of(context, weight)
    if gain is not None:
        gain = jnp.expand_dims(as_output(gain), range(batch))
        change = (gain - 1) * inner.astype(gain.dtype) + gain * change
    return [jnp.moveaxis(add(inner, change, True), range(batch, y.ndim), numbers.offset_dims)]


def _taken(context: Context, weight: Weight, ids: Any, eqn: Equation, values: Sequence[Any], axis: int) -> Any:
    """Kernels picked by indices, as of experts: those of a stack, with their pairs."""
    numbers, y = eqn.params["dimension_numbers"], evaluated(eqn, values)[0]
    if context.record is not None:
        context.record(weight.leaf, Use("take", taken=axes_of(weight.leaf.axes[axis])))
    batch = [dim for dim in range(y.ndim) if dim not in numbers.offset_dims]
    (atom,) = weight.leaf.axes[axis]
    new = tuple(Atom(atom.axis, (*atom.part, -1 - i), y.shape[dim]) for i, dim in enumerate(batch))
    found = taken(weight, atom, ids[..., numbers.start_index_map.index(axis)], new)
    kept = [atoms for other, atoms in enumerate(weight.leaf.axes) if other != axis]
    if axis not in numbers.collapsed_slice_dims:
        kept.insert(axis, ())
    rest, picked = iter(kept), iter(new)
    return with_axes(found, y, [(next(picked),) if dim in batch else next(rest) for dim in range(y.ndim)])


def _looked_up(eqn: Equation, shape: tuple[int, ...]) -> int | None:
    """The one axis that a gather looks up; None where it does something else."""
    numbers, sizes, mode = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.params["mode"]
    indexed = [axis for axis in numbers.start_index_map if sizes[axis] != shape[axis] or shape[axis] == 1]
    indexed = indexed if len(indexed) == 1 else [axis for axis in indexed if axis in numbers.collapsed_slice_dims]
    if len(indexed) != 1 or numbers.operand_batching_dims or sizes[indexed[0]] != 1:
        return None
    whole = all(sizes[axis] == shape[axis] for axis in range(len(shape)) if axis != indexed[0])
    inside = mode != jax.lax.GatherScatterMode.FILL_OR_DROP or len(numbers.start_index_map) == 1
    return indexed[0] if whole and inside and set(numbers.collapsed_slice_dims) <= {indexed[0]} else None


def ragged_dot(context: Context, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """``jax.lax.ragged_dot``: each row meets the pair of its own group (expert)."""
    x, weight, sizes = values
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain = not isinstance(x, Weight) and isinstance(weight, Weight) and jnp.ndim(x) == 2
    if not plain or not _standard(numbers):
        return refuse(context, eqn, values, "is read by a ragged product of another form than ragged_dot's")
    axes = weight.leaf.axes
    if context.record is not None:
        context.record(
            weight.leaf, Use("ragged_dot", axes_of(axes[0]), rows=axes_of(axes[1]), columns=axes_of(axes[2]))
        )
    y = evaluated(eqn, values)[0]
    if not weight.adapter:
        return [y]
    shared = not weight.leaf.stack and weight.leaf.columns == (*axes[0], *axes[2])
    if weight.leaf.rows != axes[1] or not (shared or weight.leaf.stack == axes[0]):
        refused(weight.leaf, "is contracted over other axes than its adapters were made for")
    if gain_of(context, weight) is not None or "lora_bias" in weight.adapter:
        refused(weight.leaf, "is read by a ragged product and trains more than a pair (DoRA, lora_bias)")
    own, x = weight.adapter, dropped_input(context, weight, x)
    a, b, scale = own["lora_a"], own["lora_b"], own["lora_scale"]
    groups = size_of(axes[0])
    accum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    with jax.named_scope(SCOPE):
        if shared:
            b = jnp.moveaxis(b.reshape(b.shape[0], groups, -1), 1, 0)
            z = jnp.matmul(x, a.astype(x.dtype), preferred_element_type=accum_dtype).astype(x.dtype)
        else:
            b = b * scale[:, None, None].astype(b.dtype)
            z = jax.lax.ragged_dot(x, a.astype(x.dtype), sizes, preferred_element_type=accum_dtype).astype(x.dtype)
        change = jax.lax.ragged_dot(z, b.astype(x.dtype), sizes, preferred_element_type=accum_dtype)
    return [add(y, change * scale.astype(accum_dtype) if shared else change, True)]


def _standard(numbers: Any) -> bool:
    """Whether it is (m, k) x (g, k, n) -> (m, n) with the groups along m."""
    (contract, batch) = numbers.dot_dimension_numbers
    return (
        [list(side) for side in contract] == [[1], [1]]
        and not any(map(list, batch))
        and list(numbers.lhs_ragged_dimensions) == [0]
        and list(numbers.rhs_group_dimensions) == [0]
    )


def _axes(groups: Sequence[Any]) -> frozenset[int]:
    return axes_of([atom for group in groups for atom in group])


RULES: dict[str, Any] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    **dict.fromkeys(("ragged_dot", "ragged_dot_general"), ragged_dot),
}
