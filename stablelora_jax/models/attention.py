"""Attention: of whole rows, in one of four kinds of the same meaning, and over a cache's slots by a mask.

===========  =============================================================  ==========================================
kind         implementation                                                 saved for the backward (checkpoint names)
===========  =============================================================  ==========================================
``xla``      dense and masked; any backend, dtype and window                probabilities ``attention_probs``, (T, T)
``blockwise``   flash attention in plain XLA; likewise, never (T, T)           ``context`` and log-sum-exp ``lse``
``cudnn``    cuDNN's flash attention; NVIDIA GPU, bfloat16 or float16       of packed rows ``context`` and ``lse``;
                                                                            of whole rows see ``remat.saveable``
``splash``   Pallas' flash attention; TPU, not under a partitioning jit     both as ``context``
===========  =============================================================  ==========================================
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.attention_kernels.blockwise import blockwise
from stablelora_jax.models.attention_kernels.cudnn import compute_capability, cudnn
from stablelora_jax.models.attention_kernels.splash import splash
from stablelora_jax.utils.errors import InputError

KINDS = ("xla", "blockwise", "cudnn", "splash")
SHORT = 128  # tokens of a row up to which ``xla`` is as fast as ``blockwise``: measured on a CPU
SEGMENTS = 64  # of a packed row, its pads included, up to which ``auto`` chooses ``cudnn``


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B S K hd"],
    v: Float[Array, "B S K hd"],
    mask: Bool[Array, "B T S"] | Bool[np.ndarray, "B T S"],
) -> Float[Array, "B T H hd"]:
    """Grouped-query attention by a mask; K divides H."""
    B, T, H, hd = q.shape
    q = q.reshape(B, T, k.shape[2], H // k.shape[2], hd)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * hd**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), v).reshape(B, T, H, hd)


def self_attention(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K hd"],
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | Int[Array, ""] | None = None,
    kind: str = "xla",
    segments: int | None = SEGMENTS,
) -> Float[Array, "B T H hd"]:
    """Causal grouped-query attention of whole rows: token i attends to itself and to earlier tokens of its segment.

    Softmax and sums run in ``promote_types(dtype, float32)``. The names of the table above are set so that a
    ``jax.checkpoint`` policy that saves them runs neither the softmax nor the kernel twice.

    Args:
      q: (B, T, H, hd).
      k: (B, T, K, hd), where K divides H; each key head serves H / K consecutive query heads.
      v: (B, T, K, hd).
      segment_ids: (B, T) int32, or None for one segment a row; equal ids are adjacent, 0 are pads (also a segment).
      window: token i attends to j with ``i - j < window``, window >= 1; an int, or with ``xla`` and ``blockwise`` a
        traced int32 scalar, so that each scanned layer has its own; None for no limit.
      kind: one of ``KINDS``, see ``best_attention``.
      segments: of ``cudnn``: the most runs of equal ids in a row, static; a row of more is NaN. Saves
        (B * segments, H, T) float32. None: unknown, which ``cudnn`` refuses for packed rows.

    Returns:
      (B, T, H, hd) in the dtype of q; finite at pads.

    Raises:
      InputError: an unknown kind, or arguments that this kind does not take.

    Example::

        >>> q = k = v = jnp.ones((1, 3, 2, 4))
        >>> self_attention(q, k, v, window=2).shape
        (1, 3, 2, 4)
    """
    if isinstance(window, int) and window >= q.shape[1]:
        window = None
    if kind == "xla":
        return _dense(q, k, v, segment_ids, window)
    if kind == "blockwise":
        return blockwise(q, k, v, segment_ids, window)
    if kind == "cudnn":
        return cudnn(q, k, v, segment_ids, window, segments)
    if kind == "splash":
        return splash(q, k, v, segment_ids, window)
    raise InputError(f"no attention is named {kind!r}: there are {', '.join(KINDS)}")


def _dense(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, window: int | jax.Array | None
) -> jax.Array:
    B, T, H, hd = q.shape
    accum_dtype = jnp.promote_types(q.dtype, jnp.float32)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if segment_ids is not None:
        mask = (mask[None] & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None, None]
    q = q.reshape(B, T, k.shape[2], H // k.shape[2], hd)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=accum_dtype) * hd**-0.5
    probs = _softmax(scores, mask).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v, preferred_element_type=accum_dtype)
    named: jax.Array = checkpoint_name(out.reshape(B, T, H, hd).astype(q.dtype), "context")
    return named


def _probabilities(scores: jax.Array, mask: jax.Array) -> jax.Array:
    probs = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
    named: jax.Array = checkpoint_name(probs, "attention_probs")
    return named


@jax.custom_jvp
def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where ``mask`` is on, whose derivative needs only its named result."""
    return _probabilities(scores, mask)


@_softmax.defjvp
def _softmax_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    probs = _probabilities(*primals)  # not _softmax: inside a custom_jvp call, a policy does not see the name
    return probs, probs * (tangents[0] - (probs * tangents[0]).sum(-1, keepdims=True))


def best_attention(
    platform: str,
    dtype: DTypeLike,
    head_dim: int,
    length: int,
    windows: Sequence[int] = (0,),
    segments: int = 0,
    partitioned: bool = False,
    capability: float = 0.0,
) -> str:
    """The kind for rows of ``length`` tokens.

    Args:
      platform: ``jax.default_backend()``: ``cpu``, ``gpu`` or ``tpu`` (``cuda`` and ``rocm`` are taken too).
      dtype: of q, k and v.
      head_dim: hd.
      length: T.
      windows: of the layers, 0 for none, as ``DecoderConfig.windows``.
      segments: the most segments of a row, its pads included; 0 where rows are not packed.
      partitioned: whether ``jit`` divides the activations between devices (rows inside ``shard_map`` are whole).
      capability: of an NVIDIA GPU, such as 9.0; 0 of anything else.
    """
    alike = len(set(windows)) == 1
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if platform in ("gpu", "cuda") and capability >= 8 and half and alike:
        fits = head_dim % 8 == 0 and head_dim <= (256 if capability >= 9 else 128)
        packed = capability >= 9 and segments <= SEGMENTS and not any(windows) and not partitioned
        if fits and (packed or not segments):
            return "cudnn"
    if platform == "tpu" and alike and not partitioned and length > SHORT and jnp.dtype(dtype) != jnp.float64:
        return "splash"
    return "xla" if length <= SHORT else "blockwise"


def best_here(dtype: DTypeLike, config: DecoderConfig, length: int, segments: int, partitioned: bool = False) -> str:
    """:func:`best_attention` for a model's rows on the devices of this process."""
    shape = config.head_dim, length, config.windows or (0,), segments, partitioned
    return best_attention(jax.default_backend(), dtype, *shape, compute_capability())


def require_here(kind: str) -> None:
    """Check that ``kind`` runs on the devices of this process.

    Raises:
      InputError: it is for another backend.
    """
    backend, needed = jax.default_backend(), {"cudnn": "gpu", "splash": "tpu"}.get(kind)
    if needed not in (None, backend):
        raise InputError(f"{kind} attention needs a {needed}, and here is a {backend}: choose auto")
