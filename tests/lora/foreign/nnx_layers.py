"""Layers of the models in :mod:`.nnx_models`: attention, caches, gated MLPs, in the form that NNX gives them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 23, 16, 24, 4, 2, 4


def rope(x, positions):
    """Rotary positions: x (B, T, heads, head_dim), positions (T,)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * (10.0 ** -jnp.arange(half, dtype=jnp.float32))[None]
    sin, cos = (f(angles)[None, :, None, :] for f in (jnp.sin, jnp.cos))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q, k, v, window=None, offset=0):
    """Causal attention with grouped heads: q (B, T, heads, d), k and v (B, S, kv_heads, d) -> (B, T, heads, d)."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k) * q.shape[-1] ** -0.5
    distance = offset + jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None]
    seen = (distance >= 0) & (distance < (window or k.shape[1]))
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], logits, -1e30), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape)


class Cache(nnx.Module):
    """Keys and values of one layer, written in place."""

    def __init__(self, batch, length):
        self.k, self.v = (nnx.Cache(jnp.zeros((batch, length, KV_HEADS, HEAD_DIM))) for _ in range(2))
        self.position = nnx.Variable(jnp.zeros((), jnp.int32))

    def update(self, k, v):
        start = (0, self.position[...], 0, 0)
        for variable, new in ((self.k, k), (self.v, v)):
            variable.set_value(jax.lax.dynamic_update_slice(variable[...], new, start))
        self.position.set_value(self.position[...] + k.shape[1])
        return self.k[...], self.v[...]


class QwenAttention(nnx.Module):
    def __init__(self, *, rngs):
        self.q_proj = nnx.Einsum("BTD,DNH->BTNH", (WIDTH, HEADS, HEAD_DIM), rngs=rngs)
        self.k_proj = nnx.Einsum("BSD,DKH->BSKH", (WIDTH, KV_HEADS, HEAD_DIM), rngs=rngs)
        self.v_proj = nnx.Einsum("BSD,DKH->BSKH", (WIDTH, KV_HEADS, HEAD_DIM), rngs=rngs)
        self.o_proj = nnx.Einsum("BTNH,NHD->BTD", (HEADS, HEAD_DIM, WIDTH), rngs=rngs)
        self.q_norm = nnx.RMSNorm(HEAD_DIM, rngs=rngs)
        self.k_norm = nnx.RMSNorm(HEAD_DIM, rngs=rngs)

    def __call__(self, x, cache):
        offset = 0 if cache is None else cache.position[...]
        positions = offset + jnp.arange(x.shape[1])
        q, k = rope(self.q_norm(self.q_proj(x)), positions), rope(self.k_norm(self.k_proj(x)), positions)
        v = self.v_proj(x)
        k, v = (k, v) if cache is None else cache.update(k, v)
        return self.o_proj(attention(q, k, v, offset=offset))


class GatedMLP(nnx.Module):
    def __init__(self, *, rngs):
        self.gate_proj = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class QwenLayer(nnx.Module):
    def __init__(self, *, rngs):
        self.input_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attn = QwenAttention(rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = GatedMLP(rngs=rngs)

    def __call__(self, x, cache=None):
        x = x + self.attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))
