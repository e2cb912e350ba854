"""How :mod:`.blockwise` splits rows into tiles, which pairs of tiles it visits, and the masks inside them.

A row has n tiles of t tokens. G = H / K query heads share a key head.
"""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

LAST = np.iinfo(np.int32).max
Window = int | Int[Array, ""] | None


def tile_size(length: int) -> int:
    """Tokens of a tile, a multiple of 8: a fraction of ``length`` between 64 and 256, but not above a quarter.

    A quarter of each tile on the diagonal is computed for nothing. A step of the scan is cheap on a CPU; elsewhere it
    is a few kernel launches.
    """
    fraction = 32 if jax.default_backend() == "cpu" else 16
    most = min(256, max(64, length // fraction), max(8, length // 4))
    return 8 * -(-length // (8 * -(-length // most)))


def tiled(x: Float[Array, "B T H width"], heads: int) -> Float[Array, "n B heads tG width"]:
    """Tiles of x, zeros after the end of the rows; H is a multiple of ``heads``.

    The G heads that share a key head are G rows of a matrix for each token: a CPU is slow at products over two axes.
    """
    B, T, _, width = x.shape
    t = tile_size(T)
    x = jnp.pad(x, ((0, 0), (0, -T % t), (0, 0), (0, 0)))
    x = x.reshape(B, -1, t, heads, x.shape[2] // heads, width).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(*x.shape[:3], -1, width)


def tiled_all(
    q: Float[Array, "B T H hd"], k: Float[Array, "B T K hd"], v: Float[Array, "B T K hd"]
) -> tuple[Float[Array, "n B K tG hd"], Float[Array, "n B K t hd"], Float[Array, "n B K t hd"]]:
    """Tiles of queries, keys and values."""
    heads = k.shape[2]
    return tiled(q, heads), tiled(k, heads), tiled(v, heads)


def untiled(x: Float[Array, "n B heads tG width"], shape: tuple[int, ...]) -> Float[Array, "B T H width"]:
    """Tiles of queries, or of keys, as an array of ``shape`` (B, T, H, width)."""
    n, B, heads, _, width = x.shape
    x = x.reshape(n, B, heads, -1, shape[2] // heads, width).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(B, -1, *shape[2:])[:, : shape[1]]


def tiled_ids(segment_ids: Int[Array, "B T"] | None, length: int) -> Int[Array, "n B t"] | None:
    """Tiles of segment ids, pads after all others so that ids grow along a packed row; None for None."""
    if segment_ids is None:
        return None
    t = tile_size(length)
    ids = jnp.where(segment_ids == 0, LAST, segment_ids)
    ids = jnp.pad(ids, ((0, 0), (0, -length % t)), constant_values=LAST)
    return ids.reshape(len(ids), -1, t).swapaxes(0, 1)


def halves(size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """For each half of a tile on the diagonal, its queries and the keys that causality allows some of them."""
    return (slice(0, size // 2), slice(0, size // 2)), (slice(size // 2, size), slice(0, size))


def rows_of(x: Num[Array, "... tG width"], tokens: slice, size: int) -> Num[Array, "... rows width"]:
    """The rows of ``tokens`` in tiles of queries or keys of ``size`` tokens."""
    group = x.shape[-2] // size
    return x[..., tokens.start * group : tokens.stop * group, :]


def on_diagonal(
    queries: slice, keys: slice, group: int, ids: Int[Array, "n B t"] | None, window: Window, static: int | None
) -> Bool[Array, "... qG s"]:
    """Mask of the queries over the keys of each tile; broadcasts to (n, B, K, queries G, keys)."""
    distance = _distance(queries, keys, group)
    of_queries, of_keys = (None, None) if ids is None else (ids[..., queries], ids[..., keys])
    return _all([distance >= 0, *_limits(distance, of_queries, of_keys, group, window, static)])


def below_diagonal(
    i: int | Int[Array, ""],
    j: int | Int[Array, ""],
    size: int,
    group: int,
    ids: Int[Array, "n B t"] | None,
    window: Window,
    static: int | None,
) -> Bool[Array, "... qG s"] | None:
    """Mask of the queries of tile i over the keys of tile j < i; broadcasts to (B, K, size G, size); None: all on."""
    distance = (i - j) * size + _distance(slice(0, size), slice(0, size), group)
    of_queries, of_keys = (None, None) if ids is None else (ids[i], ids[j])
    limits = _limits(distance, of_queries, of_keys, group, window, static)
    return _all(limits) if limits else None


def pairs(
    count: int, size: int, ids: Int[Array, "n B t"] | None, window: Window, static: int | None
) -> tuple[np.ndarray, np.ndarray, Bool[Array, " pairs"] | None]:
    """Rows i and columns j < i of the tiles to visit, and whether each is needed; None: all are."""
    reach = count if static is None else min(count, -(-(static - 1) // size) + 1)
    found = [(i, i - d) for i in range(count) for d in range(1, min(i + 1, reach))]
    i, j = np.array(found, np.int32).reshape(-1, 2).T
    needed = None
    if window is not None:
        needed = jnp.asarray((i - j - 1) * size + 1 < window)
    if ids is not None:
        first, last = ids.min(-1), ids.max(-1)
        overlap = ((first[i] <= last[j]) & (first[j] <= last[i])).any(-1)
        needed = overlap if needed is None else needed & overlap
    return i, j, needed


def _distance(queries: slice, keys: slice, group: int) -> jax.Array:
    """Query position less key position for slices of one tile: (queries G, keys)."""
    return jnp.arange(queries.start, queries.stop).repeat(group)[:, None] - jnp.arange(keys.start, keys.stop)[None]


def _limits(
    distance: jax.Array,
    of_queries: jax.Array | None,
    of_keys: jax.Array | None,
    group: int,
    window: Window,
    static: int | None,
) -> list[jax.Array]:
    """The masks of windows, by ``distance``, and of segments, by the ids of queries (..., q) and keys (..., s)."""
    limits = [distance < bound for bound in (window, static) if bound is not None]
    if of_queries is not None and of_keys is not None:
        limits.append((of_queries.repeat(group, axis=-1)[..., :, None] == of_keys[..., None, :])[..., None, :, :])
    return limits


def _all(masks: list[jax.Array]) -> jax.Array:
    """Where all masks are True; one of lower rank lacks leading axes."""
    ndim = max(mask.ndim for mask in masks)
    return reduce(jnp.logical_and, [jnp.expand_dims(mask, range(ndim - mask.ndim)) for mask in masks])
