"""A fingerprint of the exact content of a tree of arrays, computed on the devices that hold them.

Two 32-bit sums over all elements: ``sum_i fmix(word(x_i) ^ p(i)) mod 2^32``, where ``word`` and ``fmix`` are the block
mixer and the finalizer of MurmurHash3 (Appleby, public domain) and ``p`` is the position of the element: for the first
sum its index in C order, for the second its coordinates times odd constants. Every step is exact integer arithmetic and
the sum commutes, so a sharding, a number of devices or a backend changes nothing; ``word`` and ``fmix`` are bijective,
so one changed element always changes both sums. It detects changes and mistakes, not forgeries.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

U32 = 2**32


def fingerprint(params: Any, *, rounded: bool = False) -> dict[str, str]:
    """``{dotted name: "float32[3,96,288] 0123456789abcdef"}``: shape, dtype and a 64-bit hash of the bits of each leaf.

    With ``rounded``, floats are brought to bfloat16 first, so that the same weights in float32 and in bfloat16 agree.

    Leaves are NumPy arrays (put on the default device) or ``jax.Array`` of any sharding, also over several processes
    (all of them must call this): booleans, integers, floats of 8 to 64 bits, scalars, empty arrays. Only eight bytes a
    leaf are fetched, and no leaf is copied.

    Example::

      >>> fingerprint({"w": np.zeros((2, 3), np.float32)})["w"].split()[0]
      'float32[2,3]'
    """
    leaves = named_leaves(params)
    sums = {name: _sums(_whole_words(leaf, rounded), rounded) for name, leaf in leaves.items()}  # all begun at once
    return {n: f"{form(leaves[n], rounded)} {int(first):08x}{int(second):08x}" for n, (first, second) in sums.items()}


def named_leaves(params: Any) -> dict[str, Any]:
    """The leaves by dotted name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def form(leaf: Any, rounded: bool = False) -> str:
    """Dtype and shape, ``float32[3,96,288]``, as they begin a leaf's fingerprint."""
    dtype = jnp.dtype(jnp.bfloat16) if _rounds(leaf, rounded) else _dtype(leaf)
    return f"{dtype}[{','.join(map(str, np.shape(leaf)))}]"


def _dtype(leaf: Any) -> Any:
    return np.asarray(leaf).dtype if np.isscalar(leaf) else leaf.dtype


def _rounds(leaf: Any, rounded: bool) -> bool:
    return rounded and jnp.issubdtype(_dtype(leaf), jnp.floating)


def _whole_words(leaf: Any, rounded: bool) -> Any:
    """Elements of 64 bits on the host as pairs of 32, which need no 64-bit types on the device; else as it is."""
    if isinstance(leaf, jax.Array):
        return leaf
    if _rounds(leaf, rounded):
        return np.asarray(leaf).astype(jnp.bfloat16)
    array = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    return array.reshape(*array.shape, 1).view(np.uint32) if array.dtype.itemsize == 8 else array


@partial(jax.jit, static_argnums=1)
def _sums(x: jax.Array, rounded: bool = False) -> tuple[jax.Array, jax.Array]:
    """Both sums of ``x``."""
    words = _words(x.astype(jnp.bfloat16) if _rounds(x, rounded) else x)
    if not words.size:
        return jnp.uint32(0), jnp.uint32(0)
    words = words * jnp.uint32(0xCC9E2D51)
    words = ((words << 15) | (words >> 17)) * jnp.uint32(0x1B873593)
    steps = [int(np.prod(words.shape[i + 1 :], dtype=object)) for i in range(words.ndim)]
    odd = [pow(0x9E3779B1, i + 1, U32) for i in range(words.ndim)]
    mixed = (_mixed(words ^ _places(words.shape, steps, 1)), _mixed(words ^ _places(words.shape, odd, 0x9747B28C)))
    both = lambda p, q: (p[0] + q[0], p[1] + q[1])  # noqa: E731
    start = (jnp.uint32(0), jnp.uint32(0))
    # one reduction for both sums: XLA on CPU fuses all before it into that, but into neither of two
    sums: tuple[jax.Array, jax.Array] = jax.lax.reduce(mixed, start, both, tuple(range(words.ndim)))
    return sums


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32; elements of 64 bits have two, along a new last axis."""
    if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 8:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
        return bits.astype(jnp.uint32)
    return x.astype(jnp.uint32)


def _places(shape: tuple[int, ...], steps: list[int], seed: int) -> jax.Array:
    place = jnp.full(shape, seed, jnp.uint32)
    for axis, step in enumerate(steps):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step % U32)
    return place


def _mixed(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
