"""``jit`` over a mesh ``(data, fsdp, tensor)``: rows, base and activations are split as :mod:`rules` says.

Arrays are global: a compiled function is written as for one device, and the compiler puts the collectives in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stablelora_jax.parallel.layout import Layout, Takes
from stablelora_jax.parallel.rules import ROWS, base_spec, constrained, gathered_ends
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import keys_of

AXES = ("data", "fsdp", "tensor")


def mesh_layout(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    key_value_heads: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """A mesh over ``devices``, by default all of all processes.

    Args:
      data: replicas of the base; None: what the other two leave.
      fsdp: the base is split over so many, and gathered layer by layer; rows are split, too.
      tensor: products are split over so many, which see the same rows.
      key_value_heads: of the model; attention is split where ``tensor`` divides them.
      devices: whose number is the product of the three.

    Raises:
      InputError: it is not.
    """
    every = list(devices or jax.devices())
    sizes = _sizes(data, fsdp, tensor, len(every))
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=every)
    heads = key_value_heads % tensor == 0
    whole = NamedSharding(mesh, PartitionSpec())

    def base(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, base_spec(path, shape, dict(mesh.shape), split_heads=heads))

    return Layout(
        title=f"a mesh of {' x '.join(f'{size} {axis}' for size, axis in zip(sizes, AXES, strict=True))} devices",
        parts=sizes[0] * sizes[1],
        axis=None,
        base_sharding=base,
        place_state=partial(_state, mesh),
        place_rows=partial(_rows, mesh),
        abstract=partial(_abstract, mesh, base),
        fetch=lambda tree: jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data), tree),
        sum_parts=lambda tree: jax.lax.with_sharding_constraint(tree, whole),
        compile=partial(_compiled, mesh, heads),
    )


def _state(mesh: Mesh, tree: Any) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, whole, lambda index: host[index])

    return jax.tree.map(put, tree)


def _rows(mesh: Mesh, read: Callable[[slice], Any], count: int) -> Any:
    """The parts that this process's devices hold lie between two rows; only these are read."""
    split = NamedSharding(mesh, PartitionSpec(ROWS))
    parts = split.addressable_devices_indices_map((count,)).values()
    spans = [part[0].indices(count) for part in parts if part is not None]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)

    def put(x: Any) -> jax.Array:
        def part(index: Any) -> Any:
            start, stop, _ = index[0].indices(count)
            return x[start - low : stop - low]

        return jax.make_array_from_callback((count, *x.shape[1:]), split, part)

    return jax.tree.map(put, read(slice(low, high)))


def _abstract(mesh: Mesh, base: Callable[..., NamedSharding], tree: Any, takes: Takes) -> Any:
    fixed = {"state": NamedSharding(mesh, PartitionSpec()), "rows": NamedSharding(mesh, PartitionSpec(ROWS))}

    def shape(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        lie = fixed.get(takes) or base(keys_of(path), x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lie)

    return jax.tree_util.tree_map_with_path(shape, tree)


def _compiled(
    mesh: Mesh, heads: bool, function: Callable[..., Any], takes: Sequence[Takes], donate: Sequence[int] = ()
) -> Callable[..., Any]:
    def inside(*arguments: Any) -> Any:
        given = [gathered_ends(x, mesh) if own == "base" else x for x, own in zip(arguments, takes, strict=True)]
        with nn.intercept_methods(constrained(mesh, split_heads=heads)):
            return function(*given)

    return jax.jit(inside, out_shardings=NamedSharding(mesh, PartitionSpec()), donate_argnums=tuple(donate))


def _sizes(data: int | None, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    least = fsdp * tensor
    if min(1 if data is None else data, fsdp, tensor) < 1:
        raise InputError(f"a mesh needs positive sizes, not data {data}, fsdp {fsdp}, tensor {tensor}")
    sizes = (data if data is not None else max(1, devices // least), fsdp, tensor)
    if math.prod(sizes) != devices:
        raise InputError(f"a mesh of {' x '.join(map(str, sizes))} (data, fsdp, tensor) is not {devices} devices")
    return sizes
