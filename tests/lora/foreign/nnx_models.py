"""Tiny NNX models with the structure of public ones: written from their published layout, not copied.

* :class:`Qwen3` after bonsai's: ``nnx.Einsum`` projections, RMS norms of each head, a cache of ``nnx.Cache`` variables.
* :class:`Gemma3` after bonsai's: ``nnx.Linear`` projections, four norms, windows, a vision tower, a tied head.
* :class:`Llama` after tunix's: an own ``Einsum`` module whose leaf is ``w``, blocks under ``jax.checkpoint``.
* :class:`Scanned` and :class:`Unrolled`: one decoder, as a stack by ``nnx.vmap`` and ``nnx.scan``, and as a list.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tests.lora.foreign.nnx_layers import HEAD_DIM, HEADS, KV_HEADS, VOCAB, WIDTH, GatedMLP, QwenLayer, attention, rope


class Qwen3(nnx.Module):
    """bonsai's Qwen3: layers in an ``nnx.List``, an untied head, a list of caches."""

    def __init__(self, *, num_layers=2, rngs):
        self.embedder = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([QwenLayer(rngs=rngs) for _ in range(num_layers)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Einsum("BTD,DV->BTV", (WIDTH, VOCAB), rngs=rngs)

    def __call__(self, tokens, cache=None):
        x = self.embedder.embedding[...].at[(tokens,)].get()
        for i, layer in enumerate(self.layers):
            x = layer(x, None if cache is None else cache[i])
        return self.lm_head(self.final_norm(x))


class ZeroCentredNorm(nnx.Module):
    """Gemma's RMS norm, which multiplies by ``1 + scale``."""

    def __init__(self, size):
        self.scale = nnx.Param(jnp.zeros(size))

    def __call__(self, x):
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        return x * jnp.expand_dims(1.0 + self.scale[...], range(x.ndim - 1))


class GemmaAttention(nnx.Module):
    def __init__(self, window, *, rngs):
        self.window = window
        self.q_proj = nnx.Linear(WIDTH, HEADS * HEAD_DIM, use_bias=False, rngs=rngs)
        self.k_proj = nnx.Linear(WIDTH, KV_HEADS * HEAD_DIM, use_bias=False, rngs=rngs)
        self.v_proj = nnx.Linear(WIDTH, KV_HEADS * HEAD_DIM, use_bias=False, rngs=rngs)
        self.o_proj = nnx.Linear(HEADS * HEAD_DIM, WIDTH, use_bias=False, rngs=rngs)
        self.q_norm, self.k_norm = ZeroCentredNorm(HEAD_DIM), ZeroCentredNorm(HEAD_DIM)

    def __call__(self, x):
        heads = lambda y: y.reshape(*x.shape[:-1], -1, HEAD_DIM)
        q, k = self.q_norm(heads(self.q_proj(x))), self.k_norm(heads(self.k_proj(x)))
        q, k = (rope(y, jnp.arange(x.shape[1])) for y in (q, k))
        y = attention(q, k, heads(self.v_proj(x)), self.window)
        return self.o_proj(y.reshape(*x.shape[:-1], -1))


class GemmaLayer(nnx.Module):
    def __init__(self, window, *, rngs):
        self.self_attn = GemmaAttention(window, rngs=rngs)
        self.mlp = GatedMLP(rngs=rngs)
        self.input_layernorm, self.post_attention_layernorm = ZeroCentredNorm(WIDTH), ZeroCentredNorm(WIDTH)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = ZeroCentredNorm(WIDTH), ZeroCentredNorm(WIDTH)

    def __call__(self, x):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x)))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class ScaledEmbedding(nnx.Module):
    """Gemma's look-up table: the ``nnx.Embed`` is called ``weight``, and the scale is a constant array."""

    def __init__(self, *, rngs):
        self.weight = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.embed_scale = nnx.data(jnp.asarray(WIDTH**0.5))

    def __call__(self, tokens):
        return self.weight(tokens) * self.embed_scale


class VisionTower(nnx.Module):
    """Patches by ``nnx.Conv``, learned positions, one layer of attention: images (B, 4, 4, 3) -> (B, 4, 8)."""

    def __init__(self, *, rngs):
        self.patch_embedding = nnx.Conv(3, 8, kernel_size=(2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.position_embedding = nnx.Embed(4, 8, rngs=rngs)
        self.position_ids = nnx.data(jnp.arange(4)[None])
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, images):
        x = self.patch_embedding(images)
        x = x.reshape(x.shape[0], -1, 8) + self.position_embedding(self.position_ids)
        return x + self.attention(self.layer_norm(x))


class Gemma3(nnx.Module):
    """bonsai's Gemma3: text that begins with an image's four patches; the head is the look-up table."""

    def __init__(self, *, rngs):
        self.embed_tokens = ScaledEmbedding(rngs=rngs)
        self.vision_tower = VisionTower(rngs=rngs)
        self.mm_input_projection_weight = nnx.Param(jax.random.normal(rngs.params(), (8, WIDTH)) / 3)
        self.layers = nnx.List([GemmaLayer(window, rngs=rngs) for window in (3, None)])
        self.norm = ZeroCentredNorm(WIDTH)

    def __call__(self, tokens, images):
        seen = jnp.matmul(self.vision_tower(images), self.mm_input_projection_weight[...])
        x = jnp.concatenate([seen, self.embed_tokens(tokens)], axis=1)
        for layer in self.layers:
            x = layer(x)
        return 30.0 * jnp.tanh(self.embed_tokens.weight.attend(self.norm(x)) / 30.0)


class Einsum(nnx.Module):
    """tunix's own Einsum, whose one parameter is called ``w``."""

    def __init__(self, einsum_str, shape, *, rngs):
        self.einsum_str = einsum_str
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) * 0.3)

    @jax.named_scope("einsum")
    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class WNorm(nnx.Module):
    """tunix's RMS norm, whose scale is called ``w``, too."""

    def __init__(self, size):
        self.w = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        rms = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return jnp.expand_dims(self.w[...], range(x.ndim - 1)) * x / rms


class LlamaLayer(nnx.Module):
    def __init__(self, *, rngs):
        self.input_layernorm, self.post_attention_layernorm = WNorm(WIDTH), WNorm(WIDTH)
        self.q_proj = Einsum("BTD,DNH->BTNH", (WIDTH, HEADS, HEAD_DIM), rngs=rngs)
        self.kv_proj = Einsum("BSD,CDKH->CBSKH", (2, WIDTH, KV_HEADS, HEAD_DIM), rngs=rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", (HEADS, HEAD_DIM, WIDTH), rngs=rngs)
        self.mlp = GatedMLP(rngs=rngs)

    def block(self, x):
        y, positions = self.input_layernorm(x), jnp.arange(x.shape[1])
        k, v = self.kv_proj(y)
        x = x + self.o_proj(attention(rope(self.q_proj(y), positions), rope(k, positions), v))
        return x + self.mlp(self.post_attention_layernorm(x))

    def __call__(self, x):
        graphdef, state = nnx.split(self)
        return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state).block(x))(state, x)


class Llama(nnx.Module):
    """tunix's Llama: a bare look-up table, read by ``table[(tokens,)]`` and by ``x @ table.T``."""

    def __init__(self, *, num_layers=2, rngs):
        self.input_embedding = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, WIDTH)))
        self.layers = nnx.List([LlamaLayer(rngs=rngs) for _ in range(num_layers)])
        self.final_norm = WNorm(WIDTH)

    def __call__(self, tokens):
        x = self.input_embedding[(tokens,)]
        for layer in self.layers:
            x = layer(x)
        return jnp.dot(self.final_norm(x), self.input_embedding[...].T)


class Scanned(nnx.Module):
    """A decoder whose layers are initialised by ``nnx.vmap`` and run by ``nnx.scan`` over ``nnx.remat``."""

    def __init__(self, *, num_layers=3, rngs):
        self.embedder = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        make = nnx.vmap(lambda rngs: QwenLayer(rngs=rngs), in_axes=0, out_axes=0)
        self.layers = make(rngs.split(num_layers))
        self.lm_head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        step = nnx.remat(lambda layer, x: layer(x))
        body = nnx.scan(lambda x, layer: step(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.lm_head(body(self.embedder(tokens), self.layers))


class Unrolled(nnx.Module):
    """:class:`Scanned` with its layers in a list."""

    def __init__(self, *, num_layers=3, rngs):
        self.embedder = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([QwenLayer(rngs=rngs) for _ in range(num_layers)])
        self.lm_head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedder(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Noisy(nnx.Module):
    """State beside the parameters: running statistics, and dropout with keys that are counted."""

    def __init__(self, *, rngs):
        self.fc = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.norm(self.fc(x)))))
