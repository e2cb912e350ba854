"""The two products of the low-rank path, ``z = x A`` and ``z B``, with a backward pass that knows which side is thin.

Beside ``jnp.matmul`` and its transpose: a factor keeps its float32 master and gets a float32 gradient, while all
products take their operands in the dtype of the activations (autodiff would multiply float32 by bfloat16); the gradient
of a factor reads the wide operand as it lies (autodiff would copy it, transposed); and where a factor is constant, what
only its gradient needs is not kept (LoRA-FA, arXiv 2308.03303: nothing but ``x A``). The head's product is such a one,
too: it reads bfloat16 and gives float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@jax.tree_util.register_static
@dataclass(frozen=True)
class Type:
    """What the backward pass must know of an operand that it may not keep."""

    dtype: Any
    sharding: Any  # on a mesh with explicit axes; else None


def matmul(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x @ factor``: x (..., n), factor (n, m) of any float dtype; (..., m) in at least float32.

    Inside ``jax.shard_map`` and on a mesh with explicit axes the gradient of ``factor`` is summed over the devices and
    lies as ``factor`` does. Reverse-mode differentiable only.
    """
    axes = _varying(x) | _varying(factor)
    return _matmul(_cast(x, axes), _cast(factor, axes))


@jax.custom_vjp
def _matmul(x: jax.Array, factor: jax.Array) -> jax.Array:
    return _dot(x, factor.astype(x.dtype), (x.ndim - 1,), (0,))


def _forward(x: Any, factor: Any) -> tuple[jax.Array, Any]:
    """What is None in the residuals is constant: the other has no gradient."""
    kept = x.value if factor.perturbed else None, factor.value if x.perturbed else None
    return _matmul(x.value, factor.value), (*kept, _type(x.value), _type(factor.value))


def _backward(residuals: Any, cotangent: Any) -> tuple[Any, Any]:
    x, factor, of_x, of_factor = residuals
    dx, gradient = None, None
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return dx, gradient
    cotangent = cotangent.astype(of_x.dtype)
    if factor is not None:
        operands = (cotangent, factor.astype(of_x.dtype), (cotangent.ndim - 1,), (1,))
        dx = _dot(*operands, of_x.sharding).astype(of_x.dtype)
    if x is not None:
        gradient = _of_factor(x, cotangent, of_factor).astype(of_factor.dtype)
    return dx, gradient


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _of_factor(x: jax.Array, cotangent: jax.Array, like: Type) -> jax.Array:
    """``x^T cotangent``, the wide operand read as it lies."""
    if like.sharding is None:  # of two axes XLA's CPU sums no bfloat16
        x, cotangent = (a.reshape(-1, a.shape[-1]) for a in (x, cotangent))
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] < cotangent.shape[-1]:
        return _dot(x, cotangent, rows, rows, like.sharding)
    turned = like.sharding and NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[::-1]))
    return _dot(cotangent, x, rows, rows, turned).T


def _dot(x: jax.Array, y: jax.Array, of_x: tuple[int, ...], of_y: tuple[int, ...], sharding: Any = None) -> jax.Array:
    accum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    dimensions = ((of_x, of_y), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=accum_dtype, out_sharding=sharding)


def _type(x: jax.Array) -> Type:
    """Where there is an explicit mesh, what knows nothing of it is replicated."""
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
