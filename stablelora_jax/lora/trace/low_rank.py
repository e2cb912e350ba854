"""The low-rank path of a product whose axes have labels: ``x W`` gains ``s (x A) B`` without ``A B`` being formed.

A product is described as in an einsum: each axis of the activation and of the output is a tuple of labels, which are
atoms of the weight or ``("x", axis)`` for an axis of the activation alone. Where the rows of the pair are contracted
the path is ``(x A) B``; where the columns are, ``(x B^T) A^T`` (a tied head). Atoms of the stack may be batch axes of
the product, its outputs, or contracted too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stablelora_jax.lora.dropout import drop
from stablelora_jax.lora.intercept import SCOPE, add
from stablelora_jax.lora.trace.context import Context, refused
from stablelora_jax.lora.trace.weight import Atom, Weight, matrix, size_of, transposed
from stablelora_jax.utils.matmul import matmul

Label = Any  # an Atom, or ("x", axis)
DROPOUT = ("lora_key", "lora_dropout")


def product(
    context: Context,
    weight: Weight,
    x: jax.Array,
    of_x: Sequence[tuple[Label, ...]],
    of_y: Sequence[tuple[Label, ...]],
    base: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """``base(x)``, a product with ``weight``, with its low-rank path.

    Args:
      context: with the parametrisation.
      weight: with an adapter.
      x: the activation.
      of_x: the labels of each of its axes.
      of_y: those of the output's.
      base: the product itself, as a function of the activation.
    """
    given, kept = _labels(of_x), set(_labels(of_y))
    contracted = [label for label in given if label not in kept]
    gain, dropped = gain_of(context, weight), dropped_input(context, weight, x)
    backwards = _backwards(weight, contracted, gain)
    if gain is not None and backwards:
        x = dropped = (x * _spread(gain, weight, of_x)).astype(x.dtype)
    y = base(x)
    change = _change(context, transposed(weight) if backwards else weight, dropped, of_x, _labels(of_y))
    change = change.reshape(y.shape)
    if gain is None or backwards:
        return add(y, change, True)
    gain = _spread(gain, weight, of_y)
    inner = y if dropped is x else base(dropped)
    return add(y, (gain - 1) * inner.astype(gain.dtype) + gain * change, True)


def _backwards(weight: Weight, contracted: Sequence[Label], gain: Any) -> bool:
    """Whether the columns are contracted in the place of the rows.

    Raises:
      InputError: neither are, or a part of both, or the gain of a column cannot be taken out of the sum.
    """
    leaf, inner = weight.leaf, set(contracted)
    rows, columns = set(leaf.rows), set(leaf.columns)
    forwards = rows <= inner and not columns & inner
    if not forwards and not (columns <= inner and not rows & inner):
        refused(leaf, "is contracted over other axes than its adapters were made for")
    if gain is not None and set(leaf.stack) & inner:
        refused(leaf, "is summed over the pairs of a stack, each with a gain of its own")
    if not forwards and "lora_bias" in weight.adapter:
        refused(leaf, "has a lora_bias and is read transposed")
    return not forwards


def gain_of(context: Context, weight: Weight) -> Any:
    """The gain of each column, (stack..., out); None where the parametrisation has none."""
    adapter = {name: leaf for name, leaf in weight.adapter.items() if name not in DROPOUT}
    gain, scale = context.parametrization.gain, adapter["lora_scale"]
    stack, size = scale.shape, (size_of(weight.leaf.rows), size_of(weight.leaf.columns))
    if jax.eval_shape(gain, jax.ShapeDtypeStruct((*stack, *size), jnp.float32), adapter, scale) is None:
        return None
    return gain(matrix(weight), adapter, scale)


def dropped_input(context: Context, weight: Weight, x: jax.Array) -> jax.Array:
    """``x`` after the dropout of the low-rank path; ``x`` itself where there is none."""
    if "lora_key" not in weight.adapter:
        return x
    key, rate = (weight.adapter[name] for name in DROPOUT)
    for _ in weight.leaf.stack:  # a batch of pairs shares a mask, which is over its axis too
        key, rate = key[0], rate[0]
    return drop(x, rate, jax.random.wrap_key_data(key, impl=context.key_impl))


def low_rank(context: Context, x: jax.Array, own: Any) -> jax.Array:
    """``s (x A) B`` for x (..., in): (..., out) in at least float32."""

    def down(a: jax.Array) -> jax.Array:
        return matmul(x, a).astype(x.dtype)

    change = up(context, down(own["lora_a"]), own)
    return change if context.observe is None else context.observe(change, own, down)


def up(context: Context, z: jax.Array, own: Any) -> jax.Array:
    """``s z B`` and its bias for ``z = x A`` (..., r)."""
    change: jax.Array = context.parametrization.delta(checkpoint_name(z, "lora_xa"), own, own["lora_scale"])
    if "lora_bias" in own:
        bias = own["lora_bias"].astype(change.dtype) * own["lora_scale"].astype(change.dtype)
        change = change + jnp.expand_dims(bias, range(change.ndim - 1))
    return change


def _change(context: Context, weight: Weight, x: jax.Array, of_x: Any, wanted: Sequence[Label]) -> jax.Array:
    """The change of the output, its axes in the order ``wanted``."""
    weight, given = _shared(weight, wanted, of_x), _labels(of_x)
    stack, rows, columns = weight.leaf.stack, weight.leaf.rows, weight.leaf.columns
    mapped = [atom for atom in stack if atom in given]
    rest = [label for label in given if label not in (*stack, *rows)]
    sizes = dict(zip(given, _sizes(x, of_x), strict=True))
    spread = x.reshape([sizes[label] for label in given])
    moved = jnp.transpose(spread, [given.index(label) for label in (*mapped, *rest, *rows)])
    moved = moved.reshape(*(sizes[label] for label in (*mapped, *rest)), size_of(rows))
    own = {name: array for name, array in weight.adapter.items() if name not in DROPOUT}
    path: Any = lambda x, own: low_rank(context, x, own)  # noqa: E731
    for atom in reversed(stack):
        path = jax.vmap(path, (0 if atom in mapped else None, 0))
    with jax.named_scope(SCOPE):
        change = path(moved, own)
    order = [*stack, *rest, *columns]
    change = change.reshape([a.size for a in stack] + [sizes[label] for label in rest] + [a.size for a in columns])
    summed = [atom for atom in stack if atom not in wanted]
    change = change.sum([order.index(atom) for atom in summed])
    order = [label for label in order if label not in summed]
    return jnp.transpose(change, [order.index(label) for label in wanted])


def _shared(weight: Weight, wanted: Sequence[Label], of_x: Any) -> Weight:
    """Columns that are batch axes of the product become a stack whose pairs share A."""
    given = set(_labels(of_x))
    leaf, adapter = weight.leaf, dict(weight.adapter)
    for atom in [atom for atom in leaf.columns if atom in given and atom in wanted]:
        for name, array in adapter.items():
            if name in ("lora_b", "lora_bias", "lora_magnitude_vector"):
                spread = array.reshape(*array.shape[:-1], *(a.size for a in leaf.columns))
                front = jnp.moveaxis(spread, array.ndim - 1 + leaf.columns.index(atom), len(leaf.stack))
                adapter[name] = front.reshape(*front.shape[: array.ndim], -1)
            else:
                stack = array.shape[: len(leaf.stack)]
                wide = jnp.expand_dims(array, len(stack))
                adapter[name] = jnp.broadcast_to(wide, (*stack, atom.size, *array.shape[len(stack) :]))
        columns = tuple(one for one in leaf.columns if one != atom)
        leaf = leaf._replace(stack=(*leaf.stack, atom), columns=columns)
    return replace(weight, adapter=adapter, leaf=leaf)


def _spread(gain: jax.Array, weight: Weight, groups: Sequence[tuple[Label, ...]]) -> jax.Array:
    """A gain (stack..., out) beside an array whose axes have the labels ``groups``."""
    leaf = weight.leaf
    own = [*leaf.stack, *leaf.columns]
    labels = [label for label in _labels(groups) if label in own]
    if missing := [atom for atom in own if atom not in labels and atom.size > 1]:
        refused(leaf, f"has a gain for each entry of its axis {missing[0].axis}, which the product does not keep")
    spread = gain.reshape([atom.size for atom in own])
    spread = spread.reshape([atom.size for atom in own if atom in labels])
    kept = [atom for atom in own if atom in labels]
    spread = jnp.transpose(spread, [kept.index(label) for label in labels])
    return spread.reshape([size_of([a for a in group if a in own]) if set(group) & set(own) else 1 for group in groups])


def _labels(groups: Sequence[tuple[Label, ...]]) -> list[Label]:
    return [label for group in groups for label in group]


def _sizes(x: jax.Array, groups: Sequence[tuple[Label, ...]]) -> list[int]:
    """The size of each label of ``x``."""
    return [
        label.size if isinstance(label, Atom) else size
        for size, group in zip(x.shape, groups, strict=True)
        for label in group
    ]
