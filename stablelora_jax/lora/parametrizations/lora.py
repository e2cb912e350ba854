"""LoRA: ``W = W0 + s A B`` (Hu et al., arXiv 2106.09685, section 4.1).

The path used in training is ``x W0 + s (x A) B``; forming ``W0 + s A B`` in the step would cost 1.5 times the FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.utils.matmul import matmul

Adapter = Mapping[str, jax.Array]


def leaves(w: Float[Array, "*stack in out"], pair: Adapter, scale: jax.Array) -> dict[str, jax.Array]:
    """Nothing but the pair is trained."""
    return {}


def gain(w: Float[Array, "*stack in out"], adapter: Adapter, scale: jax.Array) -> jax.Array | None:
    """The module's own product stays as it is."""
    return None


def delta(z: Float[Array, "*batch r"], adapter: Adapter, scale: jax.Array) -> Float[Array, "*batch out"]:
    """``s z B``: z = x A (..., r) in the module's compute dtype; B (r, out); gives (..., out), at least float32."""
    b = adapter["lora_b"]
    return matmul(z, b * jnp.asarray(scale, b.dtype))  # of the two, B is the small one to scale


def merge(w: Float[Array, "*stack in out"], adapter: Adapter, scale: jax.Array) -> Float[Array, "*stack in out"]:
    """``W0 + s A B`` for w (..., in, out) and scale (...), added at least in float32, in the dtype of ``w``."""
    return merged(w, adapter, scale).astype(w.dtype)


def merged(w: Float[Array, "*stack in out"], adapter: Adapter, scale: jax.Array) -> Float[Array, "*stack in out"]:
    """:func:`merge` before it is rounded to the dtype of ``w``."""
    a, b = adapter["lora_a"], adapter["lora_b"]
    accum_dtype = jnp.promote_types(jnp.promote_types(w.dtype, a.dtype), jnp.float32)
    change = jnp.matmul(a.astype(accum_dtype), b.astype(accum_dtype)) * jnp.asarray(scale, accum_dtype)[..., None, None]
    return w.astype(accum_dtype) + change
