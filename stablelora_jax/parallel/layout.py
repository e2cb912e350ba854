"""The interface of all layouts, and helpers for functions that run on several devices.

Adapters, optimizer state and results are replicated under every layout: they are about a hundredth of the base. Every
device computes the same update from the same gradient, so norms, latches, QR and eigh of pair-aware optimizers are
those of one device, to the bit. The rows of a batch are split and, on a mesh, the base and its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import keys_of

T = TypeVar("T")
R = TypeVar("R")
Takes = Literal["state", "base", "rows"]  # the kind of an argument of a compiled function


class TreeMap(Protocol):
    """A function of a tree of arrays to a tree of the same structure."""

    def __call__(self, tree: T, /) -> T:
        """The tree, each leaf replaced."""


class Abstract(Protocol):
    """A function of shapes to the shapes and shardings that a compiled function takes."""

    def __call__(self, tree: T, takes: Takes, /) -> T:
        """``tree`` with ``jax.ShapeDtypeStruct`` leaves."""


class Compile(Protocol):
    """A function that compiles ``function`` for the devices of a layout."""

    def __call__(
        self, function: Callable[..., R], takes: Sequence[Takes], donate: Sequence[int] = ()
    ) -> Callable[..., R]:
        """``takes`` has the kind of each argument; the arguments at the positions ``donate`` are donated."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How arrays are placed on the devices of a run and functions compiled for them.

    Made by :func:`stablelora_jax.parallel.pmap_layout` or :func:`stablelora_jax.parallel.mesh_layout`.

    Attributes:
      title: for messages, such as ``"8 devices"``.
      parts: the number of equal parts into which the rows of a batch are split, over all processes.
      axis: the name of the axis for collectives in compiled functions; None: their arrays are global.
      base_sharding: the sharding of a base parameter, from its path and shape.
      place_state: host arrays, the same in every process -> replicated.
      place_rows: ``(read, B)`` -> rows split over the parts; ``read`` gives the host rows of a slice of the B rows, and
        each process reads its own alone.
      abstract: shapes, and the kind of argument -> the shapes and shardings that a compiled function takes.
      fetch: the result of a compiled function -> NumPy arrays, in every process.
      sum_parts: inside a compiled function: sums over this part -> sums over all parts, replicated.
      compile: compiles a function; see :class:`Compile`.
    """

    title: str
    parts: int
    axis: str | None
    base_sharding: Callable[[tuple[str, ...], tuple[int, ...]], Sharding]
    place_state: TreeMap
    place_rows: Callable[[Callable[[slice], Any], int], Any]
    abstract: Abstract
    fetch: Callable[[Any], Any]
    sum_parts: TreeMap
    compile: Compile

    def place_base(self, params: T) -> T:
        """Parameters, or any tree that no compiled function changes, placed by :attr:`base_sharding`."""

        def place(path: Any, x: Any) -> jax.Array:
            placed: jax.Array = jax.device_put(x, self.base_sharding(keys_of(path), jnp.shape(x)))
            return placed

        placed_params: T = jax.tree_util.tree_map_with_path(place, params)
        return placed_params

    def split(self, tree: T) -> T:
        """Host arrays (B, ...) that every process holds whole, split by row."""
        leaves = jax.tree.leaves(tree)
        rows: T = self.place_rows(lambda part: jax.tree.map(lambda x: x[part], tree), len(leaves[0]))
        return rows

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


def gather(tree: T, axis: str | None) -> T:
    """The rows of all parts, (B, ...), from those of this part, (B / parts, ...)."""
    return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)


def rows_here(rows: int, axis: str | None) -> jax.Array:
    """The row numbers in the whole batch, (rows,) int32, of the ``rows`` rows that a compiled function sees.

    Example::

      >>> rows_here(3, None).tolist()
      [0, 1, 2]
    """
    start = 0 if axis is None else jax.lax.axis_index(axis) * rows
    return start + jnp.arange(rows)


def to_host(tree: T) -> T:
    """The arrays of ``tree`` as NumPy arrays, whole, in every process; all processes must call it."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_shards[0].data)
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(x, tiled=True))

    host: T = jax.tree.map(whole, tree)
    return host
