"""The leaves of a state: their names, their way to the host and back to the devices."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.utils.errors import InputError


def named_leaves(state: Any) -> dict[str, Any]:
    """The leaves by dotted name, in the tree's order.

    Raises:
      InputError: there is none, or two have one name.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    if not leaves or names == [""]:
        raise InputError("a state is a tree with leaves, such as a dict of arrays")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two leaves of the state are called {twice[0]}: rename one")
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def is_key(leaf: Any) -> bool:
    """Whether it is of ``jax.random.key``."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def form(leaf: Any) -> tuple[list[int], str]:
    """Shape and dtype."""
    return list(np.shape(leaf)), str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def _is_split(x: Any) -> bool:
    """Whether it is an array of which each process holds only a part."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def fetched(named: Mapping[str, Any]) -> dict[str, Any]:
    """Each leaf on the host if this process holds it whole; only arrays sharded over processes stay as they are."""
    data = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in named.items()}
    for leaf in data.values():
        if isinstance(leaf, jax.Array) and not _is_split(leaf):
            leaf.copy_to_host_async()
    data = {name: leaf if _is_split(leaf) else np.asarray(leaf) for name, leaf in data.items()}
    if odd := [name for name, leaf in data.items() if leaf.dtype.kind in "OSUMm"]:
        raise InputError(f"{odd[0]} of the state is no array of numbers")
    return data


def checksum_of(leaf: Any) -> int | None:
    """CRC-32 of the bits of an array on the host, in C order; None for one that is not."""
    if not isinstance(leaf, np.ndarray):
        return None
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def wanted(like: Any, checksum: int | None) -> Any:
    """What Orbax is asked for: an array with its sharding where no process held it whole, else NumPy, of no memory."""
    if not math.prod(np.shape(like)):
        return None
    if checksum is None and getattr(like, "sharding", None) is not None and not is_key(like):
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
    data = jax.eval_shape(jax.random.key_data, like) if is_key(like) else like
    return np.broadcast_to(np.zeros((), np.asarray(data).dtype if np.isscalar(data) else data.dtype), np.shape(data))


def place(value: Any, like: Any) -> Any:
    """``value`` as ``like`` is: on its devices, on the default device, NumPy, or a Python number."""
    if isinstance(like, (bool, int, float, complex)) and not isinstance(like, np.generic):
        return type(like)(value)
    if not is_key(like):
        return _spread(value, like)
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(_spread(value, like), impl=impls[0])


def _spread(value: Any, like: Any) -> Any:
    if getattr(like, "sharding", None) is None or isinstance(value, jax.Array):
        return value
    if isinstance(like, jax.Array) and not like.committed:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
