"""How a Linen module contracts its input with its kernel, so that ``x A`` can be formed in the same way.

Each case gives ``z = x A`` (..., r) and a function that puts a change (..., out) into the shape of the module's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.matmul import matmul

Place = Callable[[jax.Array], jax.Array]


def contract(
    module: Any, x: Any, kernel: jax.Array, a: jax.Array, in_axes: tuple[int, ...], args: Any, kwargs: Any
) -> tuple[jax.Array, Place]:
    """``x A`` in the compute dtype of ``module``, with float32 accumulation at least.

    Raises:
      InputError: the module contracts other axes than the adapters were made for, or in a way no pair can follow.
    """
    if isinstance(module, nn.Embed):
        a = a.astype(module.dtype or kernel.dtype)
        return jnp.take(a, x, axis=0), lambda change: change
    dtype = module.dtype or jnp.promote_types(jnp.result_type(x), kernel.dtype)
    x = jnp.asarray(x, dtype)
    if isinstance(module, nn.Dense):
        _require_axes(module, in_axes, (0,))
        return matmul(x, a).astype(dtype), lambda change: change
    a = a.astype(dtype)
    if isinstance(module, nn.Einsum):
        equation = kwargs.get("einsum_str") or (args[0] if args else None) or module.einsum_str or ""
        return _einsum(module, x, kernel, a, in_axes, equation.replace(" ", ""))
    if isinstance(module, nn.Conv):
        return _conv(module, x, kernel, a, in_axes)
    if module.batch_dims != ():
        raise InputError(f"{_name(module)} has batch_dims, which a pair cannot follow: exclude it")
    axes = tuple(module.axis) if isinstance(module.axis, tuple | list) else (module.axis,)
    axes = tuple(sorted(axis % x.ndim for axis in axes))  # as Flax orders the axes of its kernel
    _require_axes(module, in_axes, tuple(range(len(axes))))
    a = a.reshape(*(x.shape[axis] for axis in axes), a.shape[-1])
    outputs = kernel.shape[len(axes) :]
    z = _dot(x, a, axes, dtype)
    return z, lambda change: change.reshape(*z.shape[:-1], *outputs)


def _dot(x: jax.Array, a: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    accum_dtype = jnp.promote_types(dtype, jnp.float32)
    contracted = ((axes, tuple(range(len(axes)))), ((), ()))
    return jax.lax.dot_general(x, a, contracted, preferred_element_type=accum_dtype).astype(dtype)


def _conv(
    module: Any, x: jax.Array, kernel: jax.Array, a: jax.Array, in_axes: tuple[int, ...]
) -> tuple[jax.Array, Place]:
    if module.feature_group_count != 1 or module.mask is not None:
        raise InputError(f"{_name(module)} is a grouped or masked convolution, which a pair cannot follow: exclude it")
    _require_axes(module, in_axes, tuple(range(kernel.ndim - 1)))
    down = module.clone(features=a.shape[-1], use_bias=False, parent=None, name=None)
    z = down.apply({"params": {"kernel": a.reshape(*kernel.shape[:-1], a.shape[-1])}}, x)
    return z, lambda change: change


def _einsum(
    module: Any, x: jax.Array, kernel: jax.Array, a: jax.Array, in_axes: tuple[int, ...], equation: str
) -> tuple[jax.Array, Place]:
    sides, out = equation.split("->")
    left, right = sides.split(",")
    rows = "".join(letter for letter in right if letter not in out)
    columns = "".join(letter for letter in right if letter in out)
    if "." in right or any(letter in left for letter in columns) or not rows:
        raise InputError(f"{_name(module)} computes {equation!r}, which a pair cannot follow: exclude it")
    _require_axes(module, in_axes, tuple(right.index(letter) for letter in rows))
    rank = next(letter for letter in "rsuvwxyzabcdefghijklmnopqt" if letter not in equation)
    shape = dict(zip(right, kernel.shape, strict=True))
    kept = "".join(letter for letter in out if letter not in columns)
    a = a.reshape(*(shape[letter] for letter in rows), a.shape[-1])
    accum_dtype = jnp.promote_types(a.dtype, jnp.float32)
    z = jnp.einsum(f"{left},{rows}{rank}->{kept}{rank}", x, a, preferred_element_type=accum_dtype).astype(a.dtype)

    def place(change: jax.Array) -> jax.Array:
        change = change.reshape(*z.shape[:-1], *(shape[letter] for letter in columns))
        return jnp.einsum(f"{kept}{columns}->{out}", change)

    return z, place


def _require_axes(module: nn.Module, have: tuple[int, ...], want: tuple[int, ...]) -> None:
    if have != want:
        raise InputError(
            f"{_name(module)} contracts the axes {want} of its kernel, the adapters were made for {have}: "
            f"say in_axes={{{module.name!r}: {want}}} in the spec and make them again"
        )


def _name(module: nn.Module) -> str:
    return f"{type(module).__name__} {'.'.join(module.path)}"
