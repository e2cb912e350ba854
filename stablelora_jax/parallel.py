"""Data parallelism over all local devices with ``jax.pmap``: a replicated base, replicated state, batches split by row.

``pmap`` in jax >= 0.10 is ``jit(shard_map)``; it moves nothing by itself, so the base is placed on every device once
and passed to each step as an argument.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelora_jax.errors import InputError

AXIS = "data"


def replicate(tree: Any) -> Any:
    """Place ``tree`` whole on every local device, for arguments that ``pmap`` takes with ``in_axes=None``."""
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def stack_copies(tree: Any) -> Any:
    """One copy of each leaf per local device, on a new leading axis, for arguments with ``in_axes=0``."""
    n = jax.local_device_count()
    sharding = NamedSharding(_mesh(), PartitionSpec(AXIS))
    return jax.tree.map(lambda x: jax.device_put(np.broadcast_to(np.asarray(x), (n, *np.shape(x))), sharding), tree)


def first_copy(tree: Any) -> Any:
    """The first device's copy of a tree whose leaves carry the device axis, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


def split_rows(tree: Any) -> Any:
    """(B, ...) -> (devices, B / devices, ...), device i holding the i-th block of rows.

    Raises:
      InputError: the rows do not divide over the devices.
    """
    n = jax.local_device_count()

    def split(x: Any) -> Any:
        if x.shape[0] % n:
            raise InputError(f"a batch of {x.shape[0]} rows does not divide over {n} devices")
        return x.reshape(n, x.shape[0] // n, *x.shape[1:])

    return jax.tree.map(split, tree)


def _mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), (AXIS,))
