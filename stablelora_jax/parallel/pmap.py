"""Data parallelism with ``jax.pmap``: a replicated base, a copy of the state on each device, batches split by row.

``pmap`` in jax >= 0.10 is ``jit(shard_map)``; it moves nothing by itself, so the base is placed on every device once
and passed to each call as an argument. In a run of several processes each holds its own devices' copies and rows, and
the collectives go over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelora_jax.parallel.layout import Layout, Takes

AXIS = "data"


def pmap_layout(devices: Sequence[jax.Device] | None = None) -> Layout:
    """Data parallel over ``devices``, by default all of all processes."""
    every = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    here = [i for i, device in enumerate(every) if device.process_index == jax.process_index()]
    mesh, n = Mesh(np.array([every[i] for i in here]), (AXIS,)), len(here)
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))

    def state(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(np.broadcast_to(np.asarray(x), (n, *np.shape(x))), split), tree)

    def rows(read: Callable[[slice], Any], count: int) -> Any:
        own = count // len(every)
        tree = read(slice(here[0] * own, (here[-1] + 1) * own))
        return jax.tree.map(lambda x: jax.device_put(x.reshape(n, own, *x.shape[1:]), split), tree)

    def abstract(tree: Any, takes: Takes) -> Any:
        shapes = {
            "base": lambda x: x.shape,
            "state": lambda x: (n, *x.shape),
            "rows": lambda x: (n, x.shape[0] // len(every), *x.shape[1:]),
        }
        place = whole if takes == "base" else split
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shapes[takes](x), x.dtype, sharding=place), tree)

    def compiled(function: Callable[..., Any], takes: Sequence[Takes], donate: Sequence[int] = ()) -> Any:
        axes = tuple(None if one == "base" else 0 for one in takes)
        return jax.pmap(function, axis_name=AXIS, in_axes=axes, donate_argnums=tuple(donate), devices=every)

    return Layout(
        title=f"{len(every)} device{'s' * (len(every) > 1)}",
        parts=len(every),
        axis=AXIS,
        base=lambda path, shape: whole,
        state=state,
        rows=rows,
        abstract=abstract,
        fetch=lambda tree: jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree),
        total=lambda tree: jax.lax.psum(tree, AXIS),
        compile=compiled,
    )
