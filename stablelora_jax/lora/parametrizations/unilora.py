"""Uni-LoRA: one trained vector holds every number of every pair (Li et al., arXiv 2506.00799).

With theta (d,) trained, the numbers 0..D-1 of all pairs of the model are ``theta[c(i)] / sqrt(n_c(i))``, where n_j is
how often j is used: the projection P (D, d) with one entry a row has ``P^T P = I``. The assignment is
``c(i) = sigma(i) mod d``, sigma a permutation of 0..D-1, so that each entry of theta is used D // d times or once more,
as in PEFT. Sigma is a Feistel network keyed by a seed, walked in cycles (Black and Rogaway, CT-RSA 2002): any number is
looked up alone, and no list of D indices is drawn, sorted or stored. PEFT's own indices are drawn by NumPy: adapters of
its files carry them, as ``frozen_index_a``, ``frozen_index_b`` and ``frozen_counts``.

Pairs are numbered one after another by the names of their modules. An adapter keeps its numbers: taking modules out of
trained adapters leaves the others as they are. Another choice of modules is another assignment for all.

theta starts as U(-0.02, 0.02), as PEFT's: step 0 is *not* the base, but near it. There is no scale: ``scaling: none``.
PEFT's default length, 256, is too short to learn much; the paper takes 23,040 for RoBERTa-large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import SHARED, Adapter, Keys, Place
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

PAIR, READS_KERNEL = "none", False
OPTIONS = {"length": 256}
gain, delta, merge = lora.gain, lora.delta, lora.merge

BOUND = 0.02
ROUNDS = 4  # of the Feistel network
MOST = 2**31  # numbers of all pairs: above, products of their square roots leave 32 bits


def start(keys: Keys, w: Any, begun: Adapter, scale: Any, length: int) -> dict[str, jax.Array]:
    """``frozen_first`` (r,), into which :func:`share` writes; nothing of a module's own is trained."""
    return {"frozen_first": jnp.zeros(begun["lora_a"].shape[1], jnp.uint32)}


def share(key: jax.Array, adapters: Any, places: Mapping[Path, Place], dtype: Any, length: int) -> Any:
    """``lora_theta`` (d,), the seed and D; in each module the first number of each column of A and row of B.

    Raises:
      InputError: theta is longer than there are numbers in all pairs, or there are too many of those.
    """
    every = [(name, path, i) for path, place in places.items() for i, name in enumerate(place.names) if place.ranks[i]]
    firsts = {path: np.zeros((len(p.names), max(p.ranks)), np.uint32) for path, p in places.items()}
    total = 0
    for _, path, i in sorted(every):
        place = places[path]
        firsts[path][i] = total + sum(place.size) * np.arange(max(place.ranks))
        total += sum(place.size) * max(place.ranks)
    if length > total:
        raise InputError(f"options: length {length} is more than the {total} numbers of all pairs: lower it")
    if total >= MOST:
        raise InputError(f"unilora numbers at most 2**31 - 1 entries of pairs, not {total}: lower the rank")
    for path, first in firsts.items():
        room = (*path, "frozen_first")
        adapters = tree.set_in(adapters, room, jnp.asarray(first).reshape(tree.get_in(adapters, room).shape))
    theta = jax.random.uniform(key, (length,), dtype, -BOUND, BOUND)
    seed = jax.random.bits(jax.random.fold_in(key, 1), (ROUNDS,), jnp.uint32)
    return {**adapters, SHARED: {"lora_theta": theta, "frozen_seed": seed, "frozen_total": jnp.uint32(total)}}


def pair(adapter: Adapter, size: tuple[int, ...], length: int) -> dict[str, jax.Array]:
    """A (in, r) and B (r, out), gathered from theta."""
    theta = adapter["lora_theta"]
    counts = adapter["frozen_counts"] if "frozen_counts" in adapter else _counts(adapter["frozen_total"], length)
    scaled = theta / jnp.sqrt(jnp.maximum(counts, 1).astype(theta.dtype))  # d numbers; the gathers are large
    index_a, index_b = _indices(adapter, size, length)
    return {"lora_a": scaled[index_a], "lora_b": scaled[index_b]}


def _indices(adapter: Adapter, size: tuple[int, ...], length: int) -> tuple[jax.Array, jax.Array]:
    """c of A (in, r) and of B (r, out), int32."""
    if "frozen_index_a" in adapter:
        return adapter["frozen_index_a"], adapter["frozen_index_b"]
    first, (inputs, outputs) = adapter["frozen_first"], size
    numbers = first[:, None] + jnp.arange(inputs + outputs, dtype=jnp.uint32)[None]
    found = (permuted(numbers, adapter["frozen_total"], adapter["frozen_seed"]) % jnp.uint32(length)).astype(jnp.int32)
    return found[:, :inputs].T, found[:, inputs:]


def _counts(total: jax.Array, length: int) -> jax.Array:
    """How often each entry of theta is used, (d,)."""
    d = jnp.uint32(length)
    found: jax.Array = total // d + (jnp.arange(length, dtype=jnp.uint32) < total % d)
    return found


def permuted(numbers: jax.Array, total: jax.Array, seed: jax.Array) -> jax.Array:
    """A permutation of 0..total-1, which ``seed`` chooses, at each of ``numbers``; all uint32.

    The network permutes 0..ab-1, ab just above ``total``; what leaves the range is sent through it again.
    """
    b = jnp.sqrt(total.astype(jnp.float32)).astype(jnp.uint32) + 1
    a = total // b + 1

    def network(x: jax.Array) -> jax.Array:
        left, right = x // b, x % b
        for i in range(0, ROUNDS, 2):
            left = (left + _mixed(right ^ seed[i]) % a) % a
            right = (right + _mixed(left ^ seed[i + 1]) % b) % b
        return left * b + right

    def again(x: jax.Array) -> jax.Array:
        return jnp.where(x < total, x, network(x))

    found: jax.Array = jax.lax.while_loop(lambda x: jnp.any(x >= total), again, network(numbers))
    return found


def _mixed(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of ``x`` changes about half of those that come out."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
