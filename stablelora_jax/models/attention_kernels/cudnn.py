"""cuDNN's flash attention on NVIDIA GPUs, packed rows included, through jax's own binding.

``jax.nn.dot_product_attention`` knows no segments, and what its backward needs has no name for a remat policy. So this
file calls the private function behind it, which takes where each segment begins and how long it is (Hopper or newer),
with a derivative of its own whose two residuals are named. It refuses where a jax has moved that function.

Traps: before jax 0.12 the offsets of keys were scaled by the heads of queries (jax pull request 39521: other tokens'
keys, no error), so keys and values are repeated there; what cuDNN saves is (B * segments, H, T) float32, so the number
of segments costs memory; rows of tokens in no segment would stay unwritten, so pads are a segment.
"""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stablelora_jax.utils.errors import InputError, brief

OFFSETS_OF_KEYS_ARE_RIGHT = (0, 12)


def cudnn(q, k, v, segment_ids, window, segments):
    """Causal attention as ``attention.self_attention`` defines it; rows of more than ``segments`` runs are NaN.

    Raises:
      InputError: a dtype, head size, window, GPU or jax that cuDNN's kernels or this file do not take.
    """
    if not (window is None or isinstance(window, int)):
        raise InputError("cuDNN attention takes one window for all layers: choose attention: blockwise")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(f"cuDNN attention takes bfloat16 or float16, not {q.dtype}: choose attention: blockwise")
    if segment_ids is None:
        return _fused(q, k, v, None, window)
    if window is not None:
        raise InputError("cuDNN attention takes no window in packed rows: choose attention: blockwise")
    if q.size >= 2**31:
        raise InputError(f"cuDNN attention counts {q.size} elements of packed rows in int32: use smaller batches")
    if segments is None:
        raise InputError("cuDNN attention must know how many texts a row holds at most: give Decoder's segments")
    starts, lengths, fits = segments_of(segment_ids, max(2, segments))
    if jax.__version_info__ < OFFSETS_OF_KEYS_ARE_RIGHT:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return jnp.where(fits[:, None, None, None], _fused(q, k, v, (starts, lengths), None), jnp.nan)


def segments_of(segment_ids, most: int):
    """Runs of equal ids in rows of T tokens: starts (B, most + 1) and lengths (B, most) int32, -1 where there is none.

    The third value, (B,) bool, is off in rows that hold more than ``most`` runs; what is left of these is not theirs.
    """
    B, T = segment_ids.shape
    new = jnp.concatenate([jnp.ones((B, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    run = jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(new & (run < most), run, most + 1)  # out of bounds: dropped
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    starts = jnp.full((B, most + 1), -1, jnp.int32).at[jnp.arange(B)[:, None], place].set(at, mode="drop")
    ends = jnp.where(starts[:, 1:] < 0, T, starts[:, 1:])
    return starts, jnp.where(starts[:, :-1] < 0, -1, ends - starts[:, :-1]), run[:, -1] < most


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(q, k, v, packing, window):
    return _call(q, k, v, packing, window, False)


def _call(q, k, v, packing, window, residual):
    """The output and, with ``residual``, the log-sum-exps in cuDNN's own layout."""
    api, more = _api(), {"sliding_window_length": window}
    if packing is not None:
        starts, lengths = packing
        more |= {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": starts, "kv_offsets": starts}
    more |= {"scale": q.shape[-1] ** -0.5, "mask_type": _mask_type(api, packing)}
    try:
        return api.dot_product_attention(q, k, v, return_residual=residual, **more)
    except (NotImplementedError, RuntimeError) as error:
        raise InputError(f"cuDNN attention: {brief(error)} Choose attention: blockwise") from error


def _save(q, k, v, packing, window):
    out, lse = _call(q, k, v, packing, window, True)
    out, lse = checkpoint_name(out, "context"), checkpoint_name(lse, "lse")  # here, or a remat runs the kernel again
    return out, (q, k, v, packing, out, lse)


def _backward(window, saved, given):
    q, k, v, packing, out, lse = saved
    api, none = _api(), jnp.zeros(0, q.dtype)
    starts, lengths = (none, none) if packing is None else packing
    newer = {"score_mod": None} if "score_mod" in inspect.signature(api.dot_product_attention).parameters else {}
    grads = api._dot_product_attention_bwd_p_wrapper.bind(
        *(q, k, v, none, lengths, lengths, starts, starts, none, none, lse, out, given),
        scale=q.shape[-1] ** -0.5,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=_mask_type(api, packing),
        layout=api.AttentionLayout.BTNH.value,
        sliding_window_length=window,
        **newer,
    )
    return *grads[:3], None


_fused.defvjp(_save, _backward)


def _mask_type(api, packing):
    return api.MaskType.CAUSAL if packing is None else api.MaskType.PADDING_CAUSAL


def _api():
    """jax's private binding of cuDNN's attention, if it has the shape that this file knows (0.10 to 0.12 have)."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as api

        known = inspect.signature(api.dot_product_attention).parameters
        if {"q_offsets", "return_residual"} <= set(known) and api._dot_product_attention_bwd_p_wrapper:
            return api
    except (ImportError, AttributeError):
        pass
    raise InputError(f"jax {jax.__version__} has no cuDNN attention that we know: choose attention: blockwise")
