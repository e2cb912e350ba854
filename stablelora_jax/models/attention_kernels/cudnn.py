"""cuDNN's flash attention on NVIDIA GPUs: whole rows by ``jax.nn``, packed rows by :mod:`.cudnn_packed`.

``jax.nn.dot_product_attention`` has no segments. What its backward pass needs has no name for a remat policy, so a
policy that keeps attention must include :func:`saves_residuals`.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stablelora_jax.models.attention_kernels.cudnn_packed import packed_attention
from stablelora_jax.utils.errors import InputError, brief

HOPPER = 9.0  # the first compute capability whose kernels take packed rows


def cudnn(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K hd"],
    segment_ids: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
    segments: int | None,
) -> Float[Array, "B T H hd"]:
    """Causal attention as ``attention.self_attention`` defines it; rows of more than ``segments`` runs are NaN.

    Raises:
      InputError: a dtype, head size, window or GPU that cuDNN's kernels do not take.
    """
    if not (window is None or isinstance(window, int)):
        raise InputError("cuDNN attention takes one window for all layers: choose attention: blockwise")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(f"cuDNN attention takes bfloat16 or float16, not {q.dtype}: choose attention: blockwise")
    if segment_ids is None:
        return _whole_rows(q, k, v, window)
    if window is not None:
        raise InputError("cuDNN attention takes no window in packed rows: choose attention: blockwise")
    if q.size >= 2**31:
        raise InputError(f"cuDNN attention counts {q.size} elements of packed rows in int32: use smaller batches")
    if segments is None:
        raise InputError("cuDNN attention must know how many texts a row holds at most: give Decoder's segments")
    jax.eval_shape(partial(_whole_rows, window=None), q, k, v)  # jax's own checks of cuDNN, GPU and head size
    if compute_capability() < HOPPER:
        raise InputError("cuDNN attention takes packed rows on Hopper GPUs or newer: choose attention: blockwise")
    return packed_attention(q, k, v, segment_ids, max(2, segments))


def _whole_rows(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    T, local = q.shape[1], None if window is None else (window - 1, 0)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q, k, v)
    )  # jax 0.10 refuses gradients of odd T
    try:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")
        return out[:, :T]
    except (NotImplementedError, RuntimeError) as error:
        raise InputError(f"cuDNN attention: {brief(error)} Choose attention: blockwise") from error


def saves_residuals(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of ``jax.checkpoint``: save the output and the log-sum-exp of ``jax.nn.dot_product_attention``."""
    return str(primitive) == "dot_product_attention_fwd_wrapper"


def compute_capability() -> float:
    """Of the NVIDIA GPU of this process, such as 9.0; 0 of anything else."""
    found = str(getattr(jax.devices()[0], "compute_capability", ""))  # AMD's are names: gfx942
    return float(found) if re.fullmatch(r"\d+(\.\d+)?", found) else 0.0
