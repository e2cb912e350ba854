"""Flash attention in plain XLA, for any backend and dtype: tiles of queries and keys, nothing of two axes of T.

The queries of a tile keep a running maximum m, a running sum l and a running output a (online softmax: Milakov and
Gimelshein, arXiv 1805.02867; FlashAttention-2, 2307.08691)::

    s = q k^T / sqrt(hd)    m' = max(m, max s)    p = exp(s - m')    l' = l exp(m - m') + sum p
    a' = a exp(m - m') + p v    in the end:    out = a / l    lse = m + log l

Only these two are saved; the backward makes p anew::

    p = exp(s - lse)    dv = p^T do    ds = p (do v^T - sum(do * out))    dq = ds k / sqrt(hd)    dk = ds^T q / sqrt(hd)

One scan runs over the pairs of tiles on and below the diagonal. Those that a static window hides are not in its list;
those that segments or a traced window hide are skipped by a conditional. The diagonal comes first: there each token
sees itself, so m is ever after that of a real score, and what is masked underflows to 0.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

LAST = jnp.iinfo(jnp.int32).max


def tile(length: int) -> int:
    """Tokens of a tile, a multiple of 8: a part of ``length`` between 32 and 256, but not above a quarter.

    Half of each tile on the diagonal is computed in vain; a step costs a CPU next to nothing, others a few launches.
    """
    part = 32 if jax.default_backend() == "cpu" else 16
    most = min(256, max(32, length // part), max(8, length // 4))
    return 8 * -(-length // (8 * -(-length // most)))


def blockwise(q, k, v, segment_ids, window):
    """Causal attention as ``attention.self_attention`` defines it; visits T (T + tile) / 2 pairs of tokens at most."""
    static = window is None or isinstance(window, int)
    return _flash(q, k, v, segment_ids, None if static else window, window if static else None)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, segment_ids, window, static):
    return _forward(q, k, v, segment_ids, window, static)[0]


def _forward(q, k, v, segment_ids, window, static):
    """``(out, lse)``: (B, T, H, hd) and, in tiles, (n, B, K, G t)."""
    shape, scale, wide = q.shape, q.shape[-1] ** -0.5, jnp.promote_types(q.dtype, jnp.float32)
    low, ids, (q, k, v) = jnp.finfo(wide).min, _tiled_ids(segment_ids, q.shape[1]), _tiled_all(q, k, v)
    pairs = _pairs(len(q), k.shape[-2], ids, window, static)
    q, ids, window, pairs = _tied(q, ids, window, pairs)

    def visit(i, j, m, total, a):
        s = _dot("bkqd,bksd->bkqs", q[i], k[j]) * scale
        s = jnp.where(_mask(i, j, q.shape[-2], k.shape[-2], ids, window, static), s, low)
        top = jnp.maximum(m, s.max(-1))
        p, shrink = jnp.exp(s - top[..., None]), jnp.exp(m - top)
        a = a * shrink[..., None] + _dot("bkqs,bksd->bkqd", p.astype(v.dtype), v[j])
        return top, total * shrink + p.sum(-1), a

    def step(carry, pair):
        i, j, needed = pair
        old = tuple(x[i] for x in carry)
        new = visit(i, j, *old) if needed is None else jax.lax.cond(needed, visit, lambda i, j, *x: x, i, j, *old)
        return tuple(x.at[i].set(y) for x, y in zip(carry, new, strict=True)), None

    start = (jnp.full(q.shape[:-1], low, wide), jnp.zeros(q.shape[:-1], wide), jnp.zeros(q.shape, wide))
    (m, total, a), _ = jax.lax.scan(step, start, pairs)
    return _untiled(a / total[..., None], shape).astype(q.dtype), m + jnp.log(total)


def _save(q, k, v, segment_ids, window, static):
    out, lse = _forward(q, k, v, segment_ids, window, static)
    out, lse = checkpoint_name(out, "context"), checkpoint_name(lse, "lse")  # here, or a remat runs the scan again
    return out, (q, k, v, segment_ids, window, out, lse)


def _backward(static, saved, given):
    *old, segment_ids, window, out, lse = saved
    scale, ids, (q, k, v) = out.shape[-1] ** -0.5, _tiled_ids(segment_ids, out.shape[1]), _tiled_all(*old)
    inner = jnp.einsum("bthd,bthd->bth", given, out, preferred_element_type=lse.dtype)[..., None]
    given, inner = _tiled(given, k.shape[2]), _tiled(inner, k.shape[2])

    def visit(i, j):
        s = _dot("bkqd,bksd->bkqs", q[i], k[j]) * scale - lse[i][..., None]
        p = jnp.where(_mask(i, j, q.shape[-2], k.shape[-2], ids, window, static), jnp.exp(s), 0)
        ds = (p * (_dot("bkqd,bksd->bkqs", given[i], v[j]) - inner[i])).astype(q.dtype)
        dq, dk = _dot("bkqs,bksd->bkqd", ds, k[j]), _dot("bkqs,bkqd->bksd", ds, q[i])
        return dq, dk, _dot("bkqs,bkqd->bksd", p.astype(q.dtype), given[i])

    def step(carry, pair):
        i, j, needed = pair
        new = visit(i, j) if needed is None else jax.lax.cond(needed, visit, lambda i, j: none, i, j)
        return tuple(x.at[at].add(y) for x, y, at in zip(carry, new, (i, j, j), strict=True)), None

    start = tuple(jnp.zeros(x.shape, lse.dtype) for x in (q, k, v))
    none = tuple(x[0] for x in start)
    grads, _ = jax.lax.scan(step, start, _pairs(len(k), k.shape[-2], ids, window, static))
    grads = zip(grads, (scale, scale, 1), old, strict=True)
    return *(_untiled(g * by, x.shape).astype(x.dtype) for g, by, x in grads), None, None


_flash.defvjp(_save, _backward)


def _tied(*args):
    """``args``, none of which is had before all are.

    Masks need no q: autodiff of a scan over layers would make those of all pairs of tiles before it, and keep them.
    """
    return jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, args))


def _dot(form, x, y):
    return jnp.einsum(form, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _tiled(x, heads):
    """Tiles (n, B, heads, G t, width) of x (B, T, heads G, width), zeros after the end.

    The G heads that share a key head stand one below the other: a CPU is slow at products over two axes.
    """
    B, T, _, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % tile(T)), (0, 0), (0, 0)))
    x = x.reshape(B, -1, tile(T), heads, x.shape[2] // heads, width).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, width)


def _tiled_all(q, k, v):
    """Queries (n, B, K, G t, hd), and keys and values (n, B, K, t, hd)."""
    return tuple(_tiled(x, k.shape[2]) for x in (q, k, v))


def _untiled(x, shape):
    """Tiles of queries, or of keys, as an array of ``shape`` (B, T, heads, hd)."""
    n, B, heads, _, width = x.shape
    x = x.reshape(n, B, heads, shape[2] // heads, -1, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, *shape[2:])[:, : shape[1]]


def _tiled_ids(segment_ids, length):
    """Segments (n, B, t), pads after all others so that ids grow along a packed row; None where there are none."""
    if segment_ids is None:
        return None
    ids = jnp.where(segment_ids == 0, LAST, segment_ids)
    ids = jnp.pad(ids, ((0, 0), (0, -length % tile(length))), constant_values=LAST)
    return ids.reshape(len(ids), -1, tile(length)).swapaxes(0, 1)


def _mask(i, j, queries, size, ids, window, static):
    """What the queries of tile i, as :func:`_tiled` has them, see of the keys of tile j: against (B, K, G t, t)."""
    distance = (i - j) * size + (jnp.arange(queries) % size)[:, None] - jnp.arange(size)
    mask = distance >= 0
    for bound in (window, static):
        mask = mask if bound is None else mask & (distance < bound)
    if ids is None:
        return mask
    return (mask & (jnp.tile(ids[i], queries // size)[:, :, None] == ids[j][:, None, :]))[:, None]


def _pairs(count, size, ids, window, static):
    """Rows i, columns j of the tiles to visit, diagonal first, and whether each is needed, None where all are."""
    reach = count if static is None else min(count, -(-(static - 1) // size) + 1)
    i, j = np.array([(i, i - d) for i in range(count) for d in range(min(i + 1, reach))], np.int32).T
    needed = None
    if window is not None:
        needed = (i - j - 1) * size + 1 < window
    if ids is not None:
        first, last = ids.min(-1), ids.max(-1)
        meet = ((first[i] <= last[j]) & (first[j] <= last[i])).any(-1)
        needed = meet if needed is None else needed & meet
    return i, j, needed
