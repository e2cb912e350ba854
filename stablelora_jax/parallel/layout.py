"""What all layouts have in common, and what a function may notice of being spread.

Adapters, optimizer state and results are replicated, under every layout: they are a hundredth of the base, every device
then computes the same update from the same gradient, and so norms, latches, QR and eigh of pair-aware optimizers are
those of one device, to the bit. What is split are the rows of a batch and, on a mesh, the base and its activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import keys_of

Takes = Literal["state", "base", "rows"]  # what an argument of a compiled function is


class Layout(NamedTuple):
    """How a run lies on its devices; made by ``pmap_layout`` or ``mesh_layout``."""

    title: str  # for people
    parts: int  # the rows of a step are cut into so many equal parts, over all processes
    axis: str | None  # the axis of the compiled functions' collectives; None: their arrays are global
    base: Callable[[tuple[str, ...], tuple[int, ...]], Sharding]  # of a parameter, from its path and shape
    state: Callable[[Any], Any]  # a host tree, the same in every process -> replicated
    rows: Callable[[Callable[[slice], Any], int], Any]  # (host rows of a slice, their number in all) -> split
    abstract: Callable[[Any, Takes], Any]  # shapes -> the shapes and shardings that a compiled function takes
    fetch: Callable[[Any], Any]  # what a compiled function gives -> NumPy arrays, in every process
    total: Callable[[Any], Any]  # inside a compiled function: sums over this part -> over all parts, replicated
    compile: Callable[..., Callable[..., Any]]  # (function, what each argument is, donated positions)

    def place_base(self, params: Any) -> Any:
        """Parameters, or any tree that is read and never changed, where the base lies."""

        def place(path: Any, x: Any) -> jax.Array:
            return jax.device_put(x, self.base(keys_of(path), jnp.shape(x)))

        return jax.tree_util.tree_map_with_path(place, params)

    def split(self, tree: Any) -> Any:
        """The rows of host arrays (B, ...) that every process holds whole."""
        leaves = jax.tree.leaves(tree)
        return self.rows(lambda part: jax.tree.map(lambda x: x[part], tree), len(leaves[0]))

    def require_rows(self, rows: int, accumulate: int = 1) -> None:
        """Check that so many rows can be cut into parts and micro-batches.

        Raises:
          InputError: they cannot.
        """
        if rows % (self.parts * accumulate):
            micro = f" in {accumulate} micro-batches" if accumulate > 1 else ""
            raise InputError(
                f"a batch of {rows} rows does not divide over {self.title}{micro}: "
                f"batch_size must be a multiple of {self.parts * accumulate}"
            )


def gather(tree: Any, axis: str | None) -> Any:
    """The rows of all parts, from those of this part."""
    return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)


def rows_here(rows: int, axis: str | None) -> jax.Array:
    """The numbers, in the whole batch, of the ``rows`` rows that a compiled function sees."""
    start = 0 if axis is None else jax.lax.axis_index(axis) * rows
    return start + jnp.arange(rows)


def to_host(tree: Any) -> Any:
    """The arrays of ``tree`` as NumPy arrays, whole, in every process; all processes must call it."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_shards[0].data)
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
