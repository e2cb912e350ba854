"""One layer of the decoder: RMSNorm, attention and SwiGLU as Flax Linen modules without any LoRA.

Matrix products run in ``dtype``; norms, rotary embedding and attention run in ``promote_types(dtype, float32)``.
(RMSNorm: arXiv 1910.07467; SwiGLU: 2002.05202; GQA: 2305.13245.)
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.attention import SEGMENTS, attend, best_here, self_attention
from stablelora_jax.models.cache import write
from stablelora_jax.models.rope import rotate

CosSin = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]
Past = tuple[Float[Array, "B S K hd"], Float[Array, "B S K hd"]]  # keys and values of a layer's cache
New = tuple[Float[Array, "B T K hd"], Float[Array, "B T K hd"]]  # keys and values to write there


def accum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of norms, attention, logits and loss for a model that computes in ``dtype``."""
    return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + eps) * scale`` over the last axis, computed at least in float32."""

    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise ``x``; keeps its dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        y = x.astype(accum_dtype(self.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * jnp.expand_dims(scale.astype(y.dtype), range(y.ndim - 1))).astype(x.dtype)


class Attention(nn.Module):
    """Self-attention with rotary position embedding; projections named as in Hugging Face."""

    config: DecoderConfig
    dtype: DTypeLike
    kind: str
    segments: int | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope_cos_sin: CosSin,
        ids_or_mask: Int[Array, "B T"] | Bool[Array, "B T S"] | None,
        window: int | Int[Array, ""] | None,
        slot: ArrayLike | None = None,
        past: Past | None = None,
    ) -> tuple[Float[Array, "B T D"], New | None]:
        """Map ``x`` to ``(y, None)``, or with a cache's keys and values ``past`` to y and the new keys and values.

        ``ids_or_mask`` are the segment ids of whole rows, or with ``past`` the mask over the cache's slots.
        """
        c = self.config
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)

        def heads(name: str, count: int) -> jax.Array:
            y: jax.Array = checkpoint_name(dense(count * c.head_dim, use_bias=c.qkv_bias, name=name)(x), name)
            return y.reshape(*x.shape[:2], count, c.head_dim).astype(accum_dtype(self.dtype))

        q, k = heads("q_proj", c.num_attention_heads), heads("k_proj", c.num_key_value_heads)
        v = heads("v_proj", c.num_key_value_heads)
        if c.qk_norm:
            norm = partial(RMSNorm, c.rms_norm_eps, self.dtype)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k, new = rotate(q, rope_cos_sin), rotate(k, rope_cos_sin), None
        if past is None or slot is None:
            q, k, v = (x.astype(self.dtype) for x in (q, k, v))
            y = self._whole_rows(q, k, v, ids_or_mask, window)
        else:
            new = jax.tree.map(lambda old, own: own.astype(old.dtype), past, (k, v))
            k, v = (write(old, own, slot, axis=1).astype(q.dtype) for old, own in zip(past, new, strict=True))
            y = attend(q, k, v, jnp.asarray(ids_or_mask))
        y = y.reshape(*x.shape[:2], -1).astype(self.dtype)
        return dense(c.hidden_size, use_bias=c.o_bias, name="o_proj")(y), new

    def _whole_rows(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segment_ids: jax.Array | None,
        window: int | jax.Array | None,
    ) -> jax.Array:
        c, kind = self.config, self.kind
        segment_ids = None if self.segments == 1 else segment_ids
        most = 0 if segment_ids is None else self.segments or SEGMENTS + 1
        kind = best_here(q.dtype, c, q.shape[1], most) if kind == "auto" else kind
        with jax.named_scope("attention"):  # in the names of operations, for a profile
            return self_attention(q, k, v, segment_ids, window, kind, self.segments)


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Map the normalised residual stream to the MLP's output."""
        c = self.config
        dense = partial(nn.Dense, use_bias=c.mlp_bias, dtype=self.dtype, param_dtype=self.dtype)
        gate, up = (checkpoint_name(dense(c.intermediate_size, name=n)(x), n) for n in ("gate_proj", "up_proj"))
        down: jax.Array = dense(c.hidden_size, name="down_proj")(nn.silu(gate) * up)
        return down


class Block(nn.Module):
    """One pre-norm layer, shaped as a scan body: carry in, carry and the new keys and values out."""

    config: DecoderConfig
    dtype: DTypeLike
    kind: str
    segments: int | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope_cos_sin: CosSin,
        ids_or_mask: Int[Array, "B T"] | Bool[Array, "B T S"] | Int[Array, "B T S"] | None,
        slot: ArrayLike | None,
        window: Int[Array, ""] | None,
        past: Past | None,
    ) -> tuple[Float[Array, "B T D"], New | None]:
        """Map the residual stream to ``(x, new keys and values)``; ``window`` where layers have different ones.

        With a ``window`` and ``past``, ``ids_or_mask`` are the distances of :func:`.masks.windowed`.
        """
        norm = partial(RMSNorm, self.config.rms_norm_eps, self.dtype)
        attention = Attention(self.config, self.dtype, self.kind, self.segments, name="self_attn")
        if past is not None and window is not None:
            ids_or_mask = jnp.asarray(ids_or_mask) < window
        limit = max(self.config.windows, default=0) or None if window is None else window
        y, new = attention(norm(name="input_layernorm")(x), rope_cos_sin, ids_or_mask, limit, slot, past)
        x = checkpoint_name(x + y, "residual")
        x = x + MLP(self.config, self.dtype, name="mlp")(norm(name="post_attention_layernorm")(x))
        return x, new
