"""DoRA: ``W = (W0 + s A B) diag(m / n)``, n the norms of the columns of ``W0 + s A B`` (Liu et al., arXiv 2402.09353).

The magnitudes m (out,) are trained as ``lora_magnitude_vector`` and start as the norms of W0, so that step 0 is the
base. Gradients do not pass through n (section 4.3). The norms are of PEFT's ``dim=1``: one for each *output*, for an
embedding (vocabulary, features) one for each feature; the bias is not scaled. Cost beside LoRA: ``A B`` is formed once
a step and layer, which is ``in * out * r`` multiplications whatever the number of tokens.

Where m is 0, the column is not scaled: so padding layers of a stack, whose magnitudes are 0 and stay so, change
nothing, and a column of zeros does not make NaN, as it does in PEFT.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "trained", True
pair, delta = lora.pair, lora.delta


def start(keys: Keys, w: Float[Array, "in out"], begun: Adapter, scale: jax.Array) -> dict[str, jax.Array]:
    """The pair, and ``lora_magnitude_vector`` (out,): the norms of what the kernel w (in, out) begins as."""
    norms = _norms(w, pair(begun, w.shape), scale).astype(begun["lora_a"].dtype)
    return {**begun, "lora_magnitude_vector": norms}


def around(direction: Any) -> tuple[Any, Any]:
    """``(start, pair)`` of the DoRA whose direction is that of another parametrisation: its own, and the magnitudes."""

    def start_of(keys: Keys, w: jax.Array, begun: Adapter, scale: jax.Array, **more: Any) -> dict[str, jax.Array]:
        own = direction.start(keys, w, begun, scale, **more)
        magnitudes = start(keys, w, direction.pair(own, w.shape), scale)["lora_magnitude_vector"]
        return {**own, "lora_magnitude_vector": magnitudes}

    def pair_of(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
        return {**direction.pair(adapter, size), "lora_magnitude_vector": adapter["lora_magnitude_vector"]}

    return start_of, pair_of


def gain(w: Float[Array, "*stack in out"], adapter: Adapter, scale: jax.Array) -> Float[Array, "*stack out"]:
    """``m / n`` (..., out), at least float32; 1 where m is 0. Its gradient reaches m alone."""
    norms = jax.lax.stop_gradient(_norms(w, adapter, scale))
    magnitude = adapter["lora_magnitude_vector"].astype(norms.dtype)
    scaled = (magnitude != 0) & (norms != 0)
    return jnp.where(scaled, magnitude, 1.0) / jnp.where(scaled, norms, 1.0)


def merge(w: Float[Array, "*stack in out"], adapter: Adapter, scale: jax.Array) -> Float[Array, "*stack in out"]:
    """``(W0 + s A B) diag(m / n)`` for w (..., in, out), computed at least in float32, in the dtype of ``w``."""
    return (lora.merged(w, adapter, scale) * gain(w, adapter, scale)[..., None, :]).astype(w.dtype)


def _norms(w: Float[Array, "*stack in out"], adapter: Adapter, scale: jax.Array) -> Float[Array, "*stack out"]:
    found: jax.Array = jnp.linalg.norm(lora.merged(w, adapter, scale), axis=-2)
    return found
