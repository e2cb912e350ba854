"""LoRTA: all changes of a model are slices of one tensor of low CP rank (Hounie et al., arXiv 2410.04060).

With r components of the modes model dimension, head dimension, head, layer and matrix type, the change of a module of
type t in layer l, kernel (in, heads * k), is for input a, head h and its dimension b::

    dW[a, (h, b)] = s sum_q  C_in[a, q] C_k[b, q] C_heads[h, q] C_layers[l, q] C_types[t, q]

which is the pair ``A = C_in diag(C_layers[l] C_types[t])`` and B^T the Khatri-Rao product of C_heads and C_k. All five
factors are trained, r (in + k + heads + layers + types) numbers for the whole model. A type is a kind of module, such
as ``q_proj``; all have kernels of one size. ``heads`` divides the outputs of each, whatever the module. At the start
C_k is 0, so that step 0 is the base; C_in is LoRA's A and the other factors are N(0, 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import SHARED, Adapter, Keys, Place
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

PAIR, READS_KERNEL = "none", False
OPTIONS = {"heads": 1}
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: Any, begun: Adapter, scale: Any, heads: int) -> dict[str, jax.Array]:
    """``frozen_layer`` and ``frozen_type``, into which :func:`share` writes; nothing of a module's own is trained.

    Raises:
      InputError: heads that do not divide the outputs.
    """
    if w.shape[1] % heads:
        raise InputError(f"options: {heads} heads do not divide the {w.shape[1]} outputs of a kernel")
    return {"frozen_layer": jnp.int32(0), "frozen_type": jnp.int32(0)}


def share(key: jax.Array, adapters: Any, places: Mapping[Path, Place], dtype: Any, heads: int) -> Any:
    """``lora_in`` (in, r), ``lora_head_dim`` (out / heads, r), ``lora_heads``, ``lora_layers`` and ``lora_types``.

    Raises:
      InputError: kernels or ranks of different sizes, or two modules of one type in one layer.
    """
    (inputs, outputs), rank = _one_size(places)
    layers = sorted({layer for place in places.values() for layer in _layers(place) if layer is not None})
    kinds = sorted({place.kind for place in places.values()})
    _require_apart(places)
    for path, place in places.items():
        numbers = {"frozen_layer": [0 if layer is None else layers.index(layer) for layer in _layers(place)]}
        numbers["frozen_type"] = [0 if layer is None else kinds.index(place.kind) for layer in _layers(place)]
        for name, own in numbers.items():
            room = (*path, name)
            adapters = tree.set_in(adapters, room, jnp.int32(own).reshape(tree.get_in(adapters, room).shape))
    keys = dict(zip(("in", "heads", "layers", "types"), jax.random.split(key, 4), strict=True))
    sizes = {"heads": heads, "layers": len(layers), "types": len(kinds)}
    shared = {f"lora_{name}": jax.random.normal(keys[name], (size, rank), dtype) for name, size in sizes.items()}
    shared["lora_in"] = jax.random.uniform(keys["in"], (inputs, rank), dtype, -(inputs**-0.5), inputs**-0.5)
    shared["lora_head_dim"] = jnp.zeros((outputs // heads, rank), dtype)
    return {**adapters, SHARED: shared}


def pair(adapter: Adapter, size: tuple[int, ...], heads: int) -> dict[str, jax.Array]:
    """A (in, r), scaled by the factors of the layer and the type, and B (r, out), of heads and their dimensions."""
    weights = adapter["lora_layers"][adapter["frozen_layer"]] * adapter["lora_types"][adapter["frozen_type"]]
    b = adapter["lora_heads"][:, None] * adapter["lora_head_dim"][None]  # (heads, k, r)
    return {"lora_a": adapter["lora_in"] * weights[None], "lora_b": b.reshape(size[1], -1).T}


def _layers(place: Place) -> list[int | None]:
    """The layer of each element, -1 outside of layers; None where it is not adapted."""
    numbers = [-1 if layer is None else layer for layer in place.layers]
    return [number if rank else None for number, rank in zip(numbers, place.ranks, strict=True)]


def _one_size(places: Mapping[Path, Place]) -> tuple[tuple[int, int], int]:
    first = next(iter(places.values()))
    for place in places.values():
        if (place.size, max(place.ranks)) != (first.size, max(first.ranks)):
            raise InputError(
                f"lorta: {first.names[0]} {first.size} of rank {max(first.ranks)} and {place.names[0]} {place.size} of "
                f"rank {max(place.ranks)} are no slices of one tensor: target modules of one size"
            )
    return first.size, max(first.ranks)


def _require_apart(places: Mapping[Path, Place]) -> None:
    found: dict[Any, str] = {}
    for place in places.values():
        for name, layer in zip(place.names, _layers(place), strict=True):
            other = found.setdefault((place.kind, layer), name)
            if other != name and layer is not None:
                raise InputError(
                    f"lorta: {other} and {name} are of one type in one layer, which would be the same slice: exclude "
                    "one of them"
                )
