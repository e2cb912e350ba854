"""Flash attention in plain XLA, for any backend and dtype: tiles of queries and keys, nothing of two axes of T.

The queries of a tile keep a running maximum m, a running sum l and a running output a (online softmax: Milakov and
Gimelshein, arXiv 1805.02867; FlashAttention-2, 2307.08691)::

    s = q k^T / sqrt(hd)    m' = max(m, max s)    p = exp(s - m')    l' = l exp(m - m') + sum p
    a' = a exp(m - m') + p v    in the end:    out = a / l    lse = m + log l

Only these two are saved; the backward makes p anew::

    p = exp(s - lse)    dv = p^T do    ds = p (do v^T - sum(do * out))    dq = ds k / sqrt(hd)    dk = ds^T q / sqrt(hd)

The tiles on the diagonal come first, all at once and each in two halves, since the first does not see the
second. There each token sees itself, so m is ever after that of a real score, and what is masked underflows to 0.
Then one scan runs over the pairs of tiles below the diagonal. Those that a static window hides are not in its list;
those that segments or a traced window hide are skipped by a conditional.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stablelora_jax.models.attention_kernels.tiles import (
    below_diagonal,
    halves,
    on_diagonal,
    pairs,
    rows_of,
    tiled,
    tiled_all,
    tiled_ids,
    untiled,
)


def blockwise(q, k, v, segment_ids, window):
    """Causal attention as ``attention.self_attention`` defines it; T (T + tile / 2) / 2 pairs of tokens at most."""
    static = window is None or isinstance(window, int)
    return _flash(q, k, v, segment_ids, None if static else window, window if static else None)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, segment_ids, window, static):
    return _forward(q, k, v, segment_ids, window, static)[0]


def _forward(q, k, v, segment_ids, window, static):
    """``(out, lse)``: (B, T, H, hd) and, in tiles, (n, B, K, t G, 1)."""
    shape, scale, group = q.shape, q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    ids, (q, k, v) = tiled_ids(segment_ids, shape[1]), tiled_all(q, k, v)
    size, low = k.shape[-2], jnp.finfo(jnp.promote_types(q.dtype, jnp.float32)).min
    visits = pairs(len(k), size, ids, window, static)
    q, ids, window, visits = _tied(q, ids, window, visits)

    def half(queries, keys):
        mask = on_diagonal(queries, keys, group, ids, window, static)
        s = jnp.where(mask, _scores(rows_of(q, queries, size), rows_of(k, keys, size)) * scale, low)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        return top, p.sum(-1, keepdims=True), _sums(p.astype(v.dtype), rows_of(v, keys, size))

    def visit(i, j, m, total, a):
        s = _where(below_diagonal(i, j, size, group, ids, window, static), _scores(q[i], k[j]) * scale, low)
        top = jnp.maximum(m, s.max(-1, keepdims=True))
        p, shrink = jnp.exp(s - top), jnp.exp(m - top)
        return top, total * shrink + p.sum(-1, keepdims=True), a * shrink + _sums(p.astype(v.dtype), v[j])

    def step(carry, pair):
        i, j, needed = pair
        old = tuple(x[i] for x in carry)
        new = visit(i, j, *old) if needed is None else jax.lax.cond(needed, visit, lambda i, j, *x: x, i, j, *old)
        return tuple(x.at[i].set(y) for x, y in zip(carry, new, strict=True)), None

    start = jax.tree.map(lambda *x: jnp.concatenate(x, -2), *(half(*part) for part in halves(size)))
    (m, total, a), _ = jax.lax.scan(step, start, visits)
    return untiled(a / total, shape).astype(q.dtype), m + jnp.log(total)


def _save(q, k, v, segment_ids, window, static):
    out, lse = _forward(q, k, v, segment_ids, window, static)
    out, lse = checkpoint_name(out, "context"), checkpoint_name(lse, "lse")  # here, or a remat runs the scan again
    return out, (q, k, v, segment_ids, window, out, lse)


def _backward(static, saved, given):
    *old, segment_ids, window, out, lse = saved
    group, ids, (q, k, v) = out.shape[2] // old[1].shape[2], tiled_ids(segment_ids, out.shape[1]), tiled_all(*old)
    scale, size, heads = out.shape[-1] ** -0.5, k.shape[-2], k.shape[2]
    inner = jnp.einsum("bthd,bthd->bth", given, out, preferred_element_type=lse.dtype)[..., None]
    given, inner = tiled(given, heads), tiled(inner, heads)

    def gradients(mask, q, given, lse, inner, k, v):
        p = _where(mask, jnp.exp(_scores(q, k) * scale - lse), 0)
        ds = (p * (_scores(given, v) - inner)).astype(q.dtype)
        return _sums(ds, k), _sums(ds.mT, q), _sums(p.astype(q.dtype).mT, given)

    def half(queries, keys):
        mask = on_diagonal(queries, keys, group, ids, window, static)
        of_queries = (rows_of(x, queries, size) for x in (q, given, lse, inner))
        return gradients(mask, *of_queries, rows_of(k, keys, size), rows_of(v, keys, size))

    def visit(i, j):
        mask = below_diagonal(i, j, size, group, ids, window, static)
        return gradients(mask, q[i], given[i], lse[i], inner[i], k[j], v[j])

    def step(carry, pair):
        i, j, needed = pair
        new = visit(i, j) if needed is None else jax.lax.cond(needed, visit, lambda i, j: none, i, j)
        return tuple(x.at[at].add(y) for x, y, at in zip(carry, new, (i, j, j), strict=True)), None

    (dq, *first), (dq_second, *second) = (half(*part) for part in halves(size))
    sums = (y.at[..., : x.shape[-2], :].add(x) for x, y in zip(first, second, strict=True))
    start = jnp.concatenate([dq, dq_second], -2), *sums
    none = tuple(jnp.zeros_like(x[0]) for x in start)
    grads, _ = jax.lax.scan(step, start, pairs(len(k), size, ids, window, static))
    grads = zip(grads, (scale, scale, 1), old, strict=True)
    return *(untiled(g * by, x.shape).astype(x.dtype) for g, by, x in grads), None, None


_flash.defvjp(_save, _backward)


def _tied(*args):
    """``args``, none of which is had before all are.

    Masks need no q: autodiff of a scan over layers would make those of all pairs of tiles before it, and keep them.
    """
    return jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, args))


def _scores(q, k):
    """(..., q, d) and (..., s, d) to (..., q, s), summed in float32 at least."""
    return jnp.matmul(q, k.mT, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))


def _sums(p, v):
    """(..., q, s) and (..., s, d) to (..., q, d), summed in float32 at least."""
    return jnp.matmul(p, v, preferred_element_type=jnp.promote_types(p.dtype, jnp.float32))


def _where(mask, x, other):
    return x if mask is None else jnp.where(mask, x, other)
