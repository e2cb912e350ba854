"""The two products of the low-rank path, ``z = x A`` and ``z B``, with a backward pass that knows which side is thin.

Beside ``jnp.matmul`` and its transpose: a factor keeps its float32 master and gets a float32 gradient, while all
products take their operands in the dtype of the activations (autodiff would multiply float32 by bfloat16); the gradient
of a factor reads the wide operand as it lies (autodiff would copy it, transposed); and where a factor is constant, what
only its gradient needs is not kept (LoRA-FA, arXiv 2308.03303: nothing but ``x A``). The head's product is such a one,
too: it reads bfloat16 and gives float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def product(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x @ factor``: x (..., n), factor (n, m) of any float dtype; (..., m) in at least float32.

    Reverse-mode differentiable only.
    """
    return _dot(x, factor.astype(x.dtype), (x.ndim - 1,), (0,))


def _forward(x: Any, factor: Any) -> tuple[jax.Array, Any]:
    """What is None in the residuals is constant: the other has no gradient."""
    kept = x.value if factor.perturbed else None, factor.value if x.perturbed else None
    dtypes = jnp.zeros(0, x.value.dtype), jnp.zeros(0, factor.value.dtype)
    return product(x.value, factor.value), (*kept, *dtypes)


def _backward(residuals: Any, cotangent: Any) -> tuple[Any, Any]:
    x, factor, of_x, of_factor = residuals
    dx, gradient = None, None
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return dx, gradient
    cotangent = cotangent.astype(of_x.dtype)
    if factor is not None:
        dx = _dot(cotangent, factor.astype(of_x.dtype), (cotangent.ndim - 1,), (1,)).astype(of_x.dtype)
    if x is not None:
        x, cotangent = (a.reshape(-1, a.shape[-1]) for a in (x, cotangent))  # of two axes XLA's CPU sums no bfloat16
        thin = x.shape[-1] < cotangent.shape[-1]
        gradient = _dot(x, cotangent, (0,), (0,)) if thin else _dot(cotangent, x, (0,), (0,)).T
        gradient = gradient.astype(of_factor.dtype)
    return dx, gradient


product.defvjp(_forward, _backward, symbolic_zeros=True)


def _dot(x: jax.Array, y: jax.Array, of_x: tuple[int, ...], of_y: tuple[int, ...]) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, y, ((of_x, of_y), ((), ())), preferred_element_type=wide)
