"""LoRA: ``W = W0 + s A B`` (Hu et al., arXiv 2106.09685, section 4.1).

The path used in training is ``x W0 + s (x A) B``; forming ``W0 + s A B`` in the step would cost 1.5 times the FLOPs.
Where the start A0, B0 is not that of the base, the change is ``s (A B - A0 B0)``, a plain pair of twice the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.utils.matmul import matmul
from stablelora_jax.utils.tree import Path

Adapter = Mapping[str, jax.Array]
PAIR, READS_KERNEL = "trained", False
SHARED = "lora_shared"  # the key, at the root of a tree of adapters, of what modules share


class Keys(NamedTuple):
    """PRNG keys for the start of one adapter."""

    own: jax.Array  # of the module
    shared: jax.Array  # the same for all modules


class Place(NamedTuple):
    """Where a module lies that shares parameters, or a stack of modules: one entry for each element, in C order."""

    kind: Path  # the module's path without the numbers of layers
    names: tuple[str, ...]
    layers: tuple[int | None, ...]  # the number of the layer; None outside of layers
    ranks: tuple[int, ...]  # 0 where the layer is not adapted
    size: tuple[int, int]  # of the kernel (in, out)


def start(keys: Keys, w: Any, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """The pair as it begins; nothing else is trained."""
    return dict(begun)


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """The pair itself, or ``[A, A0]`` (in, 2 r) and ``[B; -B0]`` (2 r, out) where its start stays subtracted."""
    if "frozen_a" not in adapter:
        return dict(adapter)
    a = jnp.concatenate([adapter["lora_a"], adapter["frozen_a"]], axis=-1)
    b = jnp.concatenate([adapter["lora_b"], -adapter["frozen_b"]], axis=-2)
    return {**{name: leaf for name, leaf in adapter.items() if name[:7] != "frozen_"}, "lora_a": a, "lora_b": b}


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
