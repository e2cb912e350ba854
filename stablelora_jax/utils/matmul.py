"""The two products of the low-rank path, ``z = x A`` and ``z B``, with derivatives that know which side is thin.

Compared with ``jnp.matmul`` and its transpose: a factor keeps its float32 master and gets a float32 gradient, while all
products take their operands in the dtype of the activations (autodiff would multiply float32 by bfloat16); the gradient
of a factor reads the wide operand in its own layout (autodiff would copy it, transposed); and where a factor is
constant, the operand that only its gradient needs is not kept (LoRA-FA, arXiv 2308.03303: nothing but ``x A``). The
head's product uses it too: it reads bfloat16 and gives float32.

The derivative is a bilinear primitive, the product itself, whose two transposes are written here in ``lax``. It is seen
in forward mode alone: the program of a backward pass holds the transposes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float


class Type(NamedTuple):
    """What a transpose must know of the operand that it does not have."""

    dtype: jnp.dtype
    sharding: NamedSharding | None  # on a mesh with explicit axes


def matmul(x: Float[Array, "*batch n"], factor: Float[Array, "n m"]) -> Float[Array, "*batch m"]:
    """``x @ factor``: x (..., n), factor (n, m) of any float dtype; (..., m) in at least float32.

    Inside ``jax.shard_map`` and on a mesh with explicit axes the gradient of ``factor`` is summed over the devices and
    is sharded as ``factor`` is. Differentiable in forward and in reverse mode, to any order.
    """
    axes = _varying(x) | _varying(factor)
    return _matmul(_cast(x, axes), _cast(factor, axes))


@jax.custom_jvp
def _matmul(x: jax.Array, factor: jax.Array) -> jax.Array:
    return _dot(x, factor.astype(x.dtype), (x.ndim - 1,), (0,))


def _jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    """A zero tangent is that of a constant: the other operand is not kept for it."""
    (x, factor), (dx, dfactor) = primals, tangents
    given = {"vmapped": (), "of_x": _type(x), "of_factor": _type(factor)}
    zero = jax.custom_derivatives.SymbolicZero
    terms = [] if isinstance(dx, zero) else [_bilinear.bind(dx, factor, **given)]
    terms += [] if isinstance(dfactor, zero) else [_bilinear.bind(x, dfactor, **given)]
    y = _matmul(x, factor)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


_matmul.defjvp(_jvp, symbolic_zeros=True)

_bilinear = Primitive("thin_matmul")  # (x, factor) -> x factor; `vmapped`: the axes of both, outermost vmap first


def _evaluated(x: jax.Array, factor: jax.Array, *, vmapped: Any, **types: Type) -> jax.Array:
    del types
    product: Any = _matmul
    for axes in reversed(vmapped):
        product = jax.vmap(product, axes)
    found: jax.Array = product(x, factor)
    return found


def _transposed_x(cotangent: jax.Array, _: Any, factor: jax.Array, *, vmapped: Any, of_x: Type, **types: Type) -> Any:
    del types
    transpose: Any = partial(_of_x, like=of_x)
    for x_axis, factor_axis in reversed(vmapped):
        transpose = _summed(jax.vmap(transpose, (0, factor_axis), x_axis or 0), x_axis)
    return transpose(cotangent, factor)


def _transposed_factor(cotangent: jax.Array, x: jax.Array, _: Any, *, vmapped: Any, of_x: Type, of_factor: Type) -> Any:
    transpose: Any = partial(_of_factor, like=of_factor)
    for x_axis, factor_axis in reversed(vmapped):
        transpose = _summed(jax.vmap(transpose, (0, x_axis), factor_axis or 0), factor_axis)
    return transpose(cotangent, x)


def _summed(transpose: Any, axis: int | None) -> Any:
    """An operand that every instance of a vmap shares gets the sum of their cotangents."""
    return transpose if axis is not None else lambda *args: transpose(*args).sum(0)


def _batched(operands: Any, axes: Any, *, vmapped: Any, **types: Type) -> tuple[jax.Array, int]:
    return _bilinear.bind(*operands, vmapped=(tuple(axes), *vmapped), **types), 0


def _abstract(x: Any, factor: Any, **given: Any) -> Any:
    return jax.make_jaxpr(partial(_evaluated, **given))(x, factor).out_avals[0]


ad.defbilinear(_bilinear, _transposed_x, _transposed_factor)
batching.primitive_batchers[_bilinear] = _batched
mlir.register_lowering(_bilinear, mlir.lower_fun(_evaluated, multiple_results=False))
_bilinear.def_impl(_evaluated)
_bilinear.def_abstract_eval(_abstract)


def _of_x(cotangent: jax.Array, factor: jax.Array, like: Type) -> jax.Array:
    """``cotangent factor^T``."""
    operands = cotangent.astype(like.dtype), factor.astype(like.dtype)
    return _dot(*operands, (cotangent.ndim - 1,), (1,), like.sharding).astype(like.dtype)


def _of_factor(cotangent: jax.Array, x: jax.Array, like: Type) -> jax.Array:
    """``x^T cotangent``, the wide operand read in its own layout."""
    cotangent = cotangent.astype(x.dtype)
    if like.sharding is None:  # of two axes XLA's CPU sums no bfloat16
        x, cotangent = (a.reshape(-1, a.shape[-1]) for a in (x, cotangent))
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] < cotangent.shape[-1]:
        return _dot(x, cotangent, rows, rows, like.sharding).astype(like.dtype)
    swapped = like.sharding and NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[::-1]))
    return _dot(cotangent, x, rows, rows, swapped).T.astype(like.dtype)


def _dot(x: jax.Array, y: jax.Array, of_x: tuple[int, ...], of_y: tuple[int, ...], sharding: Any = None) -> jax.Array:
    accum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    dimensions = ((of_x, of_y), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=accum_dtype, out_sharding=sharding)


def _type(x: jax.Array) -> Type:
    """Where there is an explicit mesh, an operand without one is replicated."""
    mesh, sharding = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding
    if AxisType.Explicit not in mesh.axis_types:
        return Type(x.dtype, None)
    return Type(x.dtype, NamedSharding(mesh, sharding.spec if sharding.mesh.axis_names else PartitionSpec()))


def _varying(x: jax.Array) -> frozenset[str]:
    """The axes of ``jax.shard_map`` over which ``x`` differs, as far as it checks that."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _cast(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``x`` as one that differs over ``axes``; the transpose sums over those over which it does not."""
    missing = tuple(sorted(axes - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
