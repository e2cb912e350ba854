"""Attention: of whole rows by one of four ways that mean the same, and of a cache's slots by a mask.

===========  =============================================================  ==========================================
kind         what it is                                                     saved for the backward (checkpoint names)
===========  =============================================================  ==========================================
``xla``      dense and masked; any backend, dtype and window                probabilities ``attention_probs``, (T, T)
``blockwise``   flash attention in plain XLA; the same, never (T, T)           ``context`` and log-sum-exp ``lse``
``cudnn``    cuDNN's flash attention; NVIDIA GPU, bfloat16 or float16       ``context`` and log-sum-exp ``lse``
``splash``   Pallas' flash attention; TPU, not under a partitioning jit     both as ``context``
===========  =============================================================  ==========================================
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.attention_kernels.blockwise import blockwise
from stablelora_jax.models.attention_kernels.cudnn import compute_capability, cudnn
from stablelora_jax.models.attention_kernels.splash import splash
from stablelora_jax.utils.errors import InputError

KINDS = ("xla", "blockwise", "cudnn", "splash")
SHORT = 128  # tokens of a row up to which the dense way is as fast as tiles: measured on a CPU
SEGMENTS = 64  # of a packed row, its pads included, that cuDNN's way takes


def attend(q, k, v, mask):
    """Grouped-query attention: q (B, T, H, hd), k and v (B, S, K, hd), mask (B, T, S) bool; gives (B, T, H, hd)."""
    B, T, H, hd = q.shape
    q = q.reshape(B, T, k.shape[2], H // k.shape[2], hd)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * hd**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), v).reshape(B, T, H, hd)


def self_attention(q, k, v, segment_ids=None, window=None, kind="xla", segments=SEGMENTS):
    """Causal grouped-query attention of whole rows: token i sees itself and what lies before it in its segment.

    Softmax and sums run in ``promote_types(dtype, float32)``. The names of the table above are set where a
    ``jax.checkpoint`` policy that saves them runs neither the softmax nor the kernel twice.

    Args:
      q: (B, T, H, hd).
      k: (B, T, K, hd), where K divides H; each key head serves the H / K query heads that stand together.
      v: (B, T, K, hd).
      segment_ids: (B, T) int32, or None for one segment a row; equal ids stand together, 0 are pads (also a segment).
      window: how far a token sees, ``i - j < window`` with window >= 1; an int, or with ``xla`` and ``blockwise`` a
        traced int32 scalar, so that each scanned layer has its own; None sees all.
      kind: one of ``KINDS``, see ``best_attention``.
      segments: of ``cudnn``: the most runs of equal ids in a row, static; a row of more is NaN. Saves
        (B * segments, H, T) float32. None: not known, which it refuses.

    Returns:
      (B, T, H, hd) in the dtype of q; finite at pads.

    Raises:
      InputError: an unknown kind, or what this kind cannot do.
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


def _dense(q, k, v, segment_ids, window):
    B, T, H, hd = q.shape
    accum_dtype = jnp.promote_types(q.dtype, jnp.float32)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if segment_ids is not None:
        mask = (mask & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None, None]
    q = q.reshape(B, T, k.shape[2], H // k.shape[2], hd)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=accum_dtype) * hd**-0.5
    probs = _softmax(scores, mask).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v, preferred_element_type=accum_dtype)
    return checkpoint_name(out.reshape(B, T, H, hd).astype(q.dtype), "context")


def _probabilities(scores, mask):
    return checkpoint_name(jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min)), "attention_probs")


@jax.custom_jvp
def _softmax(scores, mask):
    """Softmax over the last axis where ``mask`` is on, whose derivative needs nothing but its named result."""
    return _probabilities(scores, mask)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
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
    """Refuse a kind that does not run on the devices of this process.

    Raises:
      InputError: it is made for another backend.
    """
    backend, needed = jax.default_backend(), {"cudnn": "gpu", "splash": "tpu"}.get(kind)
    if needed not in (None, backend):
        raise InputError(f"{kind} attention needs a {needed}, and here is a {backend}: choose auto")
