"""One decoder for the Llama, Mistral, Qwen2 and Qwen3 families, as a Flax Linen module that knows nothing of LoRA.

::

    params = {"model": {"embed_tokens": {"embedding": (V, D)},
                        "layers": {"input_layernorm": {"scale": (L, D)},
                                   "self_attn": {"q_proj": {"kernel": (L, D, H * hd)}, "k_proj": ..., "o_proj": ...,
                                                 "q_norm": {"scale": (L, hd)}, "k_norm": ...},  # of Qwen3
                                   "post_attention_layernorm": {"scale": (L, D)},
                                   "mlp": {"gate_proj": {"kernel": (L, D, F)}, "up_proj": ..., "down_proj": ...}},
                        "norm": {"scale": (D,)}},
              "lm_head": {"kernel": (D, V)}}        # absent when the head is tied to the embedding

Modules carry Hugging Face's names; layers are scanned, so their parameters have a leading layer axis and compile time
does not grow with depth. Matrix products run in ``dtype``; norms, rotary positions, attention and logits run in
``promote_types(dtype, float32)``. (RMSNorm: arXiv 1910.07467; SwiGLU: 2002.05202; GQA: 2305.13245.)
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.errors import InputError
from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.cache import Cache, write
from stablelora_jax.models.masks import FAR, cached_mask, causal_mask, windowed
from stablelora_jax.models.rope import rotate


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of norms, attention, logits and loss for a model that computes in ``dtype``."""
    return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + eps) * scale`` over the last axis, computed at least in float32."""

    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        """Normalise ``x`` (..., D); keeps its dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        y = x.astype(wide(self.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(y.dtype)).astype(x.dtype)


def attend(q, k, v, mask):
    """Grouped-query attention: q (B, T, H, hd), k and v (B, S, K, hd), mask (B, T, S) bool; gives (B, T, H, hd)."""
    B, T, H, hd = q.shape
    q = q.reshape(B, T, k.shape[2], H // k.shape[2], hd)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * hd**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), v).reshape(B, T, H, hd)


class Attention(nn.Module):
    """Self-attention with rotary positions; projections named as in Hugging Face."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, positions, mask, past=None, slot=None):
        """Map x (B, T, D) to ``((B, T, D), None)``; with ``past``, a cache's k and v, to that and the new k and v."""
        c = self.config
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)

        def heads(name, count):
            y = dense(count * c.head_dim, use_bias=c.qkv_bias, name=name)(x)
            return y.reshape(*x.shape[:2], count, c.head_dim).astype(wide(self.dtype))

        q, k = heads("q_proj", c.num_attention_heads), heads("k_proj", c.num_key_value_heads)
        v = heads("v_proj", c.num_key_value_heads)
        if c.qk_norm:
            norm = partial(RMSNorm, c.rms_norm_eps, self.dtype)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k, new = rotate(q, positions, c.rope), rotate(k, positions, c.rope), None
        if past is not None:
            new = jax.tree.map(lambda old, own: own.astype(old.dtype), past, (k, v))
            k, v = (write(old, own, slot, axis=1).astype(q.dtype) for old, own in zip(past, new, strict=True))
        y = attend(q, k, v, mask).reshape(*x.shape[:2], -1).astype(self.dtype)
        return dense(c.hidden_size, use_bias=c.o_bias, name="o_proj")(y), new


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        """Map x (B, T, D) to (B, T, D)."""
        c = self.config
        dense = partial(nn.Dense, use_bias=c.mlp_bias, dtype=self.dtype, param_dtype=self.dtype)
        gate = dense(c.intermediate_size, name="gate_proj")(x)
        up = dense(c.intermediate_size, name="up_proj")(x)
        return dense(c.hidden_size, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer, shaped as a scan body: carry in, carry and the new keys and values out."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, positions, mask, slot, window, past):
        """Map the residual stream x (B, T, D) to ``((B, T, D), new)``; ``window`` where ``mask`` is distances."""
        norm = partial(RMSNorm, self.config.rms_norm_eps, self.dtype)
        attention = Attention(self.config, self.dtype, name="self_attn")
        mask = mask if window is None else mask < window
        y, new = attention(norm(name="input_layernorm")(x), positions, mask, past, slot)
        x = x + y
        x = x + MLP(self.config, self.dtype, name="mlp")(norm(name="post_attention_layernorm")(x))
        return x, new


class Embed(nn.Embed):
    """An embedding whose use as the head sums in ``promote_types(dtype, float32)``."""

    def attend(self, query):
        """Logits (..., V) of ``query`` (..., D)."""
        embedding = self.embedding.astype(self.dtype)
        return jnp.einsum("...d,vd->...v", query, embedding, preferred_element_type=wide(self.dtype))


class Body(nn.Module):
    """Embedding, scanned layers and final norm: Hugging Face's ``model``."""

    config: DecoderConfig
    dtype: DTypeLike

    def setup(self):
        """Build the submodules."""
        c, dtype = self.config, self.dtype
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
            length=c.num_hidden_layers,
        )
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, dtype=dtype, param_dtype=dtype)
        self.layers = scanned(c, dtype)
        self.norm = RMSNorm(c.rms_norm_eps, dtype)

    def __call__(self, tokens, positions, mask, cache=None):
        """Map tokens (B, T) to final hidden states (B, T, D) and, with a cache, new k and v (L, B, T, K, hd)."""
        windows = self.config.windows
        own = jnp.array([w or FAR for w in windows], jnp.int32) if len(set(windows)) > 1 else None
        past, slot = (None, None) if cache is None else ((cache.k, cache.v), cache.used)
        x, new = self.layers(self.embed_tokens(tokens), positions, mask, slot, own, past)
        return self.norm(x), new


class Decoder(nn.Module):
    """A causal language model. ``config`` and ``tokenizer`` (or None) travel with it; parameters do not."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    tokenizer: Any = dataclasses.field(default=None, compare=False, repr=False)

    def setup(self):
        """Build the submodules."""
        self.model = Body(self.config, self.dtype)
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                self.config.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.dtype,
                dot_general=partial(jax.lax.dot_general, preferred_element_type=wide(self.dtype)),
            )

    def __call__(self, tokens, positions=None, segment_ids=None, cache=None, at=None):
        """Next-token logits (B, T, V) in ``promote_types(dtype, float32)``; with a cache, ``(logits, cache)``.

        Args:
          tokens: (B, T) int32. Without a cache, pads belong at the end of a row, where causality hides them.
          positions: (B, T) int32; default ``0 .. T-1``. With a cache they are required (``positions_of``): -1 is a pad,
            which no token sees, and a token sees what the cache or this call holds at positions up to its own.
          segment_ids: (B, T) int32; tokens see only their own segment. Default: one segment a row. Not with a cache.
          cache: the :class:`Cache` of the tokens before these, with T slots to spare (beyond its end, nothing warns).
          at: (B, K) int32, indices into T: logits for these tokens alone, (B, K, V).
        """
        tokens = jnp.asarray(tokens)
        if cache is None:
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            keys, mask = positions, causal_mask(positions, segment_ids)
        else:
            if positions is None or segment_ids is not None:
                raise InputError("with a cache, give positions (-1 at pads) and no segment_ids")
            keys = write(cache.positions, positions, cache.used, axis=1)
            mask = cached_mask(positions, keys)
        x, new = self.model(tokens, positions, windowed(mask, positions, keys, self.config.windows), cache)
        x = x if at is None else jnp.take_along_axis(x, at[:, :, None], axis=1)
        logits = self._logits(x)
        if cache is None:
            return logits
        k, v = (write(old, own, cache.used, axis=2) for old, own in zip((cache.k, cache.v), new, strict=True))
        return logits, Cache(k, v, keys, cache.used + tokens.shape[1])

    def _logits(self, x):
        return self.model.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
