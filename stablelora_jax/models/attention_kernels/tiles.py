"""How :mod:`.blockwise` cuts rows into tiles, which pairs of tiles it visits, and what is seen in them."""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np

LAST = jnp.iinfo(jnp.int32).max


def tile(length: int) -> int:
    """Tokens of a tile, a multiple of 8: a part of ``length`` between 64 and 256, but not above a quarter.

    A quarter of each tile on the diagonal is computed in vain; a step costs a CPU little, others a few launches.
    """
    part = 32 if jax.default_backend() == "cpu" else 16
    most = min(256, max(64, length // part), max(8, length // 4))
    return 8 * -(-length // (8 * -(-length // most)))


def tiled(x, heads):
    """Tiles (n, B, heads, t G, width) of x (B, T, heads G, width), zeros after the end.

    The G heads that share a key head are G rows of a matrix for each token: a CPU is slow at products over two axes.
    """
    B, T, _, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % tile(T)), (0, 0), (0, 0)))
    x = x.reshape(B, -1, tile(T), heads, x.shape[2] // heads, width).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(*x.shape[:3], -1, width)


def tiled_all(q, k, v):
    """Queries (n, B, K, t G, hd), and keys and values (n, B, K, t, hd)."""
    return tuple(tiled(x, k.shape[2]) for x in (q, k, v))


def untiled(x, shape):
    """Tiles of queries, or of keys, as an array of ``shape`` (B, T, heads, hd)."""
    n, B, heads, _, width = x.shape
    x = x.reshape(n, B, heads, -1, shape[2] // heads, width).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(B, -1, *shape[2:])[:, : shape[1]]


def tiled_ids(segment_ids, length):
    """Segments (n, B, t), pads after all others so that ids grow along a packed row; None where there are none."""
    if segment_ids is None:
        return None
    ids = jnp.where(segment_ids == 0, LAST, segment_ids)
    ids = jnp.pad(ids, ((0, 0), (0, -length % tile(length))), constant_values=LAST)
    return ids.reshape(len(ids), -1, tile(length)).swapaxes(0, 1)


def halves(size):
    """Of each half of a tile on the diagonal its tokens, and those that they may see."""
    return (slice(0, size // 2), slice(0, size // 2)), (slice(size // 2, size), slice(0, size))


def rows_of(x, tokens, size):
    """The rows of ``tokens``, a slice, in tiles x (..., size G, width) of queries or of keys."""
    group = x.shape[-2] // size
    return x[..., tokens.start * group : tokens.stop * group, :]


def on_diagonal(queries, keys, group, ids, window, static):
    """What the slice ``queries`` of each tile sees of its slice ``keys``, against (n, B, K, queries G, keys)."""
    apart = _apart(queries, keys, group)
    own, other = (None, None) if ids is None else (ids[..., queries], ids[..., keys])
    return reduce(jnp.logical_and, [apart >= 0, *_limits(apart, own, other, group, window, static)])


def below_diagonal(i, j, size, group, ids, window, static):
    """What the tokens of tile i see of those of tile j < i, against (B, K, size G, size); None: all."""
    apart = (i - j) * size + _apart(slice(0, size), slice(0, size), group)
    own, other = (None, None) if ids is None else (ids[i], ids[j])
    limits = _limits(apart, own, other, group, window, static)
    return reduce(jnp.logical_and, limits) if limits else None


def _apart(queries, keys, group):
    """How far each of ``keys`` lies before each of ``queries``, slices of one tile: (queries G, keys)."""
    return jnp.arange(queries.start, queries.stop).repeat(group)[:, None] - jnp.arange(keys.start, keys.stop)


def _limits(apart, own, other, group, window, static):
    """What windows leave of tokens so far ``apart``, and the segments of queries and keys, (..., q) and (..., s)."""
    limits = [apart < bound for bound in (window, static) if bound is not None]
    if own is not None:
        limits.append((own.repeat(group, axis=-1)[..., :, None] == other[..., None, :])[..., None, :, :])
    return limits


def pairs(count, size, ids, window, static):
    """Rows i, columns j < i of the tiles to visit, and whether each is needed, None where all are."""
    reach = count if static is None else min(count, -(-(static - 1) // size) + 1)
    found = [(i, i - d) for i in range(count) for d in range(1, min(i + 1, reach))]
    i, j = np.array(found, np.int32).reshape(-1, 2).T
    needed = None
    if window is not None:
        needed = (i - j - 1) * size + 1 < window
    if ids is not None:
        first, last = ids.min(-1), ids.max(-1)
        meet = ((first[i] <= last[j]) & (first[j] <= last[i])).any(-1)
        needed = meet if needed is None else needed & meet
    return i, j, needed
