"""Splash attention, jax's own Pallas kernel for TPUs: causal or with one window, packed rows, grouped heads.

``jit`` does not partition the kernel: it needs activations that are whole on a device, or ``shard_map``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stablelora_jax.utils.errors import InputError

LANES = 128


def splash(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K hd"],
    segment_ids: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
    interpret: bool = False,
) -> Float[Array, "B T H hd"]:
    """Causal attention as ``attention.self_attention`` defines it; rows are padded to 128 tokens inside.

    ``interpret`` runs it on any backend, slowly.

    Raises:
      InputError: float64, or windows that differ between layers.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    if not (window is None or isinstance(window, int)):
        raise InputError("splash attention takes one window for all layers: choose attention: blockwise")
    if q.dtype == jnp.float64:
        raise InputError("splash attention takes no float64: choose attention: blockwise")
    T, heads, scale = q.shape[1], q.shape[2], q.shape[-1] ** -0.5
    q, k, v = (_padded(x).swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    size: Any = next(n for n in (512, 256, LANES) if q.shape[2] % n == 0)
    shape = (q.shape[2], q.shape[2])
    mask = kernels.CausalMask(shape) if window is None else kernels.LocalMask(shape, (window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(*[size] * 8),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name="context",  # of the output and of the log-sum-exp
    )
    if segment_ids is None:
        out: jax.Array = jax.vmap(kernel)(q, k, v)
    else:
        ids = _padded(segment_ids)
        out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=kernels.SegmentIds(s, s)))(q, k, v, ids)
    return out.swapaxes(1, 2)[:, :T]


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)) + ((0, 0),) * (x.ndim - 2))
