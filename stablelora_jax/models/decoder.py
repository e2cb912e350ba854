"""One decoder for the Llama, Mistral, Qwen2 and Qwen3 families, as a Flax Linen module without any LoRA.

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
does not grow with depth. Matrix products run in ``dtype``, logits in ``promote_types(dtype, float32)``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.block import Block, RMSNorm, accum_dtype
from stablelora_jax.models.cache import Cache, write
from stablelora_jax.models.dequantized import dequantized
from stablelora_jax.models.inputs import integers, known, token_indices
from stablelora_jax.models.masks import FAR, cached_mask, windowed
from stablelora_jax.models.remat import rematerialised
from stablelora_jax.models.rope import angles
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.matmul import matmul


class Embed(nn.Embed):
    """An embedding whose use as the head sums in ``promote_types(dtype, float32)``."""

    def attend(self, query: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits of ``query``."""
        return matmul(query, self.embedding.T)


class Body(nn.Module):
    """Embedding, scanned layers and final norm: Hugging Face's ``model``."""

    config: DecoderConfig
    dtype: DTypeLike
    remat: str
    kind: str
    segments: int | None

    def setup(self) -> None:
        """Build the submodules."""
        c, dtype = self.config, self.dtype
        scanned = nn.scan(
            rematerialised(dequantized(Block, self.variables, self.remat), self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
            length=c.num_hidden_layers,
        )
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, dtype=dtype, param_dtype=dtype)
        self.layers = scanned(c, dtype, self.kind, self.segments)
        self.norm = RMSNorm(c.rms_norm_eps, dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        ids_or_mask: Int[Array, "B T"] | Bool[Array, "B T S"] | Int[Array, "B T S"] | None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "L B T K hd"], Float[Array, "L B T K hd"]] | None]:
        """Final hidden states and, with a cache, the new keys and values; ``ids_or_mask`` as :class:`Block` has it."""
        windows = self.config.windows
        own = jnp.array([w or FAR for w in windows], jnp.int32) if len(set(windows)) > 1 else None
        past, slot = (None, None) if cache is None else ((cache.k, cache.v), cache.used)
        rope_cos_sin = angles(positions, self.config.rope, self.config.head_dim, accum_dtype(self.dtype))
        x, new = self.layers(self.embed_tokens(tokens), rope_cos_sin, ids_or_mask, slot, own, past)
        return self.norm(x), new


class Decoder(nn.Module):
    """A causal language model. ``config`` and ``tokenizer`` (or None) travel with it; parameters do not."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    tokenizer: Any = dataclasses.field(default=None, compare=False, repr=False)
    remat: str = "save_dots"  # what the forward pass saves for the backward pass, see models/remat.py
    attention: str = "auto"  # of whole rows: auto, or one of models/attention.py
    segments: int | None = None  # the most in a row with segment_ids; 1: one text, then pads; None: unknown

    def setup(self) -> None:
        """Build the submodules."""
        self.model = Body(self.config, self.dtype, self.remat, self.attention, self.segments)
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                self.config.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.dtype,
                dot_general=lambda x, kernel, dimensions, precision: matmul(x, kernel),
            )

    def __call__(
        self,
        tokens: ArrayLike,
        positions: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        cache: Cache | None = None,
        logit_positions: ArrayLike | None = None,
    ) -> Float[Array, "B N V"] | tuple[Float[Array, "B N V"], Cache]:
        """Next-token logits (B, T, V) in ``promote_types(dtype, float32)``; with a cache, ``(logits, cache)``.

        Args:
          tokens: (B, T) int32. Without a cache, pads belong at the end of a row, where causality hides them.
          positions: (B, T) int32; default ``0 .. T-1``. With a cache they are required (``positions_of``): -1 is a pad,
            to which no token attends; a token attends to the cache and this call at positions up to its own.
          segment_ids: (B, T) int32; tokens attend within their segment. Default: one segment a row. Not with a cache.
          cache: the :class:`Cache` of the tokens before these, with T free slots (beyond its end there is no error).
          logit_positions: (B, K) int32, indices into T: logits of these tokens only, (B, K, V).

        A token outside the vocabulary makes its row NaN; the id of a pad (segment 0, or position -1) does not matter.

        Raises:
          InputError: an argument of another shape or kind.
        """
        if cache is None:
            return self.logits(self.hidden(tokens, positions, segment_ids, logit_positions))
        if positions is None or segment_ids is not None:
            raise InputError("with a cache, give positions (-1 at pads) and no segment_ids")
        tokens = integers(tokens, "tokens")
        positions = integers(positions, "positions", tokens.shape)
        if not isinstance(cache, Cache) or cache.positions.shape[:1] != tokens.shape[:1]:
            raise InputError(f"cache must be what empty_cache gives for {tokens.shape[0]} rows")
        columns = _columns(logit_positions, tokens)
        tokens = known(tokens, positions < 0, self.config.vocab_size)
        keys = write(cache.positions, positions, cache.used, axis=1)
        mask = windowed(cached_mask(positions, keys), positions, keys, self.config.windows)
        x, new = self.model(tokens, positions, mask, cache)
        k, v = (write(old, own, cache.used, axis=2) for old, own in zip((cache.k, cache.v), new or (), strict=True))
        return self.logits(_select(x, columns)), Cache(k, v, keys, cache.used + tokens.shape[1])

    def hidden(
        self,
        tokens: ArrayLike,
        positions: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        logit_positions: ArrayLike | None = None,
    ) -> Float[Array, "B T D"]:
        """Inputs of the head, (B, T, D) or (B, K, D); the arguments are those of a call without a cache."""
        tokens = integers(tokens, "tokens")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        positions = integers(positions, "positions", tokens.shape)
        segment_ids = None if segment_ids is None else integers(segment_ids, "segment_ids", tokens.shape)
        columns = _columns(logit_positions, tokens)
        tokens = known(tokens, None if segment_ids is None else segment_ids == 0, self.config.vocab_size)
        return _select(self.model(tokens, positions, segment_ids)[0], columns)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits of the hidden states of :meth:`hidden`."""
        head = self.model.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        return head(x)


def head_path(config: DecoderConfig) -> tuple[str, ...]:
    """Path of the head in the parameters."""
    return ("model", "embed_tokens") if config.tie_word_embeddings else ("lm_head",)


def _columns(logit_positions: ArrayLike | None, tokens: jax.Array) -> jax.Array | None:
    return None if logit_positions is None else token_indices(logit_positions, "logit_positions", tokens)


def _select(x: jax.Array, columns: jax.Array | None) -> jax.Array:
    return x if columns is None else jnp.take_along_axis(x, columns[:, :, None], axis=1)
