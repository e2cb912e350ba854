"""Flash attention in plain XLA, for any backend and dtype: tiles of queries and keys, never an array of (T, T).

The queries of a tile keep a running maximum m, a running sum l and a running output a (online softmax: Milakov and
Gimelshein, arXiv 1805.02867; FlashAttention-2, 2307.08691)::

    s = q k^T / sqrt(hd)    m' = max(m, max s)    p = exp(s - m')    l' = l exp(m - m') + sum p
    a' = a exp(m - m') + p v    at the end:    out = a / l    lse = m + log l

Only ``out`` and ``lse`` are saved; the backward pass recomputes p::

    p = exp(s - lse)    dv = p^T do    ds = p (do v^T - sum(do * out))    dq = ds k / sqrt(hd)    dk = ds^T q / sqrt(hd)

The tiles on the diagonal come first, all at once and each in two halves, since causality hides the second half from the
first. There each token attends to itself, so m is a real score from then on, and masked scores underflow to 0.
Then one scan runs over the pairs of tiles below the diagonal. Pairs outside a static window are not in its list; pairs
that segments or a traced window mask out are skipped by a conditional.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from stablelora_jax.models.attention_kernels.tiles import (
    Window,
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

Tiles = tuple[jax.Array, ...]


def blockwise(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K hd"],
    segment_ids: Int[Array, "B T"] | None,
    window: Window,
) -> Float[Array, "B T H hd"]:
    """Causal attention as ``attention.self_attention`` defines it; T (T + tile / 2) / 2 pairs of tokens at most."""
    if window is None or isinstance(window, int):
        return _flash(q, k, v, segment_ids, None, window)
    return _flash(q, k, v, segment_ids, window, None)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: jax.Array | None,
    static: int | None,
) -> jax.Array:
    return _forward(q, k, v, segment_ids, window, static)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: jax.Array | None,
    static: int | None,
) -> tuple[jax.Array, jax.Array]:
    """``(out, lse)``: (B, T, H, hd) and, in tiles, (n, B, K, t G, 1)."""
    shape, scale, group = q.shape, q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    ids, (q, k, v) = tiled_ids(segment_ids, shape[1]), tiled_all(q, k, v)
    size, low = k.shape[-2], jnp.finfo(jnp.promote_types(q.dtype, jnp.float32)).min
    visits = pairs(len(k), size, ids, window, static)
    q, ids, window, visits = _tied(q, ids, window, visits)

    def half(queries: slice, keys: slice) -> Tiles:
        mask = on_diagonal(queries, keys, group, ids, window, static)
        s = jnp.where(mask, _scores(rows_of(q, queries, size), rows_of(k, keys, size)) * scale, low)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        return top, p.sum(-1, keepdims=True), _sums(p.astype(v.dtype), rows_of(v, keys, size))

    def visit(i: jax.Array, j: jax.Array, m: jax.Array, total: jax.Array, a: jax.Array) -> Tiles:
        s = _where(below_diagonal(i, j, size, group, ids, window, static), _scores(q[i], k[j]) * scale, low)
        top = jnp.maximum(m, s.max(-1, keepdims=True))
        p, shrink = jnp.exp(s - top), jnp.exp(m - top)
        return top, total * shrink + p.sum(-1, keepdims=True), a * shrink + _sums(p.astype(v.dtype), v[j])

    def step(carry: Tiles, pair: tuple[Any, Any, Any]) -> tuple[Tiles, None]:
        i, j, needed = pair
        old = tuple(x[i] for x in carry)
        new = visit(i, j, *old) if needed is None else jax.lax.cond(needed, visit, lambda i, j, *x: x, i, j, *old)
        return tuple(x.at[i].set(y) for x, y in zip(carry, new, strict=True)), None

    start = jax.tree.map(lambda *x: jnp.concatenate(x, -2), *(half(*part) for part in halves(size)))
    (m, total, a), _ = jax.lax.scan(step, start, visits)
    return untiled(a / total, shape).astype(q.dtype), m + jnp.log(total)


def _save(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: jax.Array | None,
    static: int | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = _forward(q, k, v, segment_ids, window, static)
    out, lse = checkpoint_name(out, "context"), checkpoint_name(lse, "lse")  # here, or a remat runs the scan again
    return out, (q, k, v, segment_ids, window, out, lse)


def _backward(static: int | None, saved: tuple[Any, ...], given: jax.Array) -> tuple[jax.Array | None, ...]:
    *inputs, segment_ids, window, out, lse = saved
    group, ids, (q, k, v) = out.shape[2] // inputs[1].shape[2], tiled_ids(segment_ids, out.shape[1]), tiled_all(*inputs)
    scale, size, heads = out.shape[-1] ** -0.5, k.shape[-2], k.shape[2]
    inner = jnp.einsum("bthd,bthd->bth", given, out, preferred_element_type=lse.dtype)[..., None]
    given, inner = tiled(given, heads), tiled(inner, heads)

    def gradients(mask: jax.Array | None, k: jax.Array, v: jax.Array, *of_queries: jax.Array) -> Tiles:
        q, given, lse, inner = of_queries
        p = _where(mask, jnp.exp(_scores(q, k) * scale - lse), 0)
        ds = (p * (_scores(given, v) - inner)).astype(q.dtype)
        return _sums(ds, k), _sums(ds.mT, q), _sums(p.astype(q.dtype).mT, given)

    def half(queries: slice, keys: slice) -> Tiles:
        mask = on_diagonal(queries, keys, group, ids, window, static)
        of_queries = (rows_of(x, queries, size) for x in (q, given, lse, inner))
        return gradients(mask, rows_of(k, keys, size), rows_of(v, keys, size), *of_queries)

    def visit(i: jax.Array, j: jax.Array) -> Tiles:
        mask = below_diagonal(i, j, size, group, ids, window, static)
        return gradients(mask, k[j], v[j], q[i], given[i], lse[i], inner[i])

    def step(carry: Tiles, pair: tuple[Any, Any, Any]) -> tuple[Tiles, None]:
        i, j, needed = pair
        new = visit(i, j) if needed is None else jax.lax.cond(needed, visit, lambda i, j: zeros, i, j)
        return tuple(x.at[at].add(y) for x, y, at in zip(carry, new, (i, j, j), strict=True)), None

    (dq, *first), (dq_second, *second) = (half(*part) for part in halves(size))
    sums = (y.at[..., : x.shape[-2], :].add(x) for x, y in zip(first, second, strict=True))
    start = jnp.concatenate([dq, dq_second], -2), *sums
    zeros = tuple(jnp.zeros_like(x[0]) for x in start)
    grads, _ = jax.lax.scan(step, start, pairs(len(k), size, ids, window, static))
    scaled = zip(grads, (scale, scale, 1), inputs, strict=True)
    return *(untiled(g * by, x.shape).astype(x.dtype) for g, by, x in scaled), None, None


_flash.defvjp(_save, _backward)


def _tied(*args: Any) -> Any:
    """``args``, none of which is available before all are.

    Masks do not depend on q: autodiff of a scan over layers would compute those of all pairs of tiles before it, and
    keep them.
    """
    return jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, args))


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """(..., q, d) and (..., s, d) to (..., q, s), summed in float32 at least."""
    return jnp.matmul(q, k.mT, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))


def _sums(p: jax.Array, v: jax.Array) -> jax.Array:
    """(..., q, s) and (..., s, d) to (..., q, d), summed in float32 at least."""
    return jnp.matmul(p, v, preferred_element_type=jnp.promote_types(p.dtype, jnp.float32))


def _where(mask: jax.Array | None, x: jax.Array, other: Any) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, other)
