"""Data parallelism with ``jax.pmap``: a replicated base, a copy of the state on each device, batches split by row.

``pmap`` in jax >= 0.10 is ``jit(shard_map)``; it moves nothing by itself, so the base is placed on every device once
and passed to each call as an argument. In a run of several processes each holds its own devices' copies and rows, and
the collectives go over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelora_jax.parallel.layout import Layout, Takes

AXIS = "data"


class Devices(NamedTuple):
    """All devices in the order of their parts, and this process's own as a mesh."""

    every: Sequence[jax.Device]
    first: int  # the place of the first own device among all; the others follow it
    own: Mesh

    @property
    def split(self) -> NamedSharding:
        """One copy, or one part, on each own device."""
        return NamedSharding(self.own, PartitionSpec(AXIS))

    @property
    def whole(self) -> NamedSharding:
        """All of it on each own device."""
        return NamedSharding(self.own, PartitionSpec())


def pmap_layout(devices: Sequence[jax.Device] | None = None) -> Layout:
    """Data parallel over ``devices``, by default all of all processes."""
    every = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    here = [i for i, device in enumerate(every) if device.process_index == jax.process_index()]
    known = Devices(every, here[0], Mesh(np.array([every[i] for i in here]), (AXIS,)))
    return Layout(
        title=f"{len(every)} device{'s' * (len(every) > 1)}",
        parts=len(every),
        axis=AXIS,
        base_sharding=lambda path, shape: known.whole,
        place_state=partial(_state, known),
        place_rows=partial(_rows, known),
        abstract=partial(_abstract, known),
        fetch=lambda tree: jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree),
        sum_parts=lambda tree: jax.lax.psum(tree, AXIS),
        compile=partial(_compiled, known),
    )


def _state(known: Devices, tree: Any) -> Any:
    n = known.own.size
    return jax.tree.map(lambda x: jax.device_put(np.broadcast_to(np.asarray(x), (n, *np.shape(x))), known.split), tree)


def _rows(known: Devices, read: Callable[[slice], Any], count: int) -> Any:
    n, part = known.own.size, count // len(known.every)
    tree = read(slice(known.first * part, (known.first + n) * part))
    return jax.tree.map(lambda x: jax.device_put(x.reshape(n, part, *x.shape[1:]), known.split), tree)


def _abstract(known: Devices, tree: Any, takes: Takes) -> Any:
    n, place = known.own.size, known.whole if takes == "base" else known.split
    shapes = {
        "base": lambda x: x.shape,
        "state": lambda x: (n, *x.shape),
        "rows": lambda x: (n, x.shape[0] // len(known.every), *x.shape[1:]),
    }
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shapes[takes](x), x.dtype, sharding=place), tree)


def _compiled(
    known: Devices, function: Callable[..., Any], takes: Sequence[Takes], donate: Sequence[int] = ()
) -> Callable[..., Any]:
    axes = tuple(None if one == "base" else 0 for one in takes)
    return jax.pmap(function, axis_name=AXIS, in_axes=axes, donate_argnums=tuple(donate), devices=known.every)
