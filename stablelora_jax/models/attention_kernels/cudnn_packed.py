"""cuDNN's flash attention over packed rows, as XLA's custom calls ``__cudnn$fmhaSoftmax`` and ``...Backward``.

jax lowers to the same calls, but its public functions take no segments. So they are made here with ``jax.ffi``; a test
compares them with what jax's own lowering of packed rows emits.

The calls take for each segment of the batch where it begins, counted in elements from the first row's first token, and
how many tokens it has. Rows of tokens in no segment would stay unwritten, so pads are a segment. The saved log-sum-exp
is (B * segments, H, T) float32: the number of segments costs memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

# The products of XLA's graph, each (contracted axes of both sides), (batch axes of both sides); q, k, v are BTNH.
PRODUCTS = {
    "bmm1": ((3, 3), ((0, 2), (0, 2))),
    "bmm2": ((3, 1), ((0, 1), (0, 2))),
}
PRODUCTS_BACKWARD = {
    "bmm1_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
    "bmm1_grad_gemm2": ((3, 1), ((0, 1), (0, 2))),
    "bmm2_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
    "bmm2_grad_gemm2": ((3, 3), ((0, 2), (0, 2))),
}
HEADS_THIRD = (0, 2, 1, 3)  # results are (B, H, T, hd), stored as (B, T, H, hd)


def packed_attention(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K hd"],
    segment_ids: Int[Array, "B T"],
    most: int,
) -> Float[Array, "B T H hd"]:
    """Causal attention within runs of equal ids; rows of more than ``most`` (2 or more) runs are NaN."""
    starts, lengths, fits = segments_of(segment_ids, most)
    return jnp.where(fits[:, None, None, None], _fused(q, k, v, starts, lengths), jnp.nan)


def segments_of(
    segment_ids: Int[Array, "B T"], most: int
) -> tuple[Int[Array, "B slots_and_end"], Int[Array, "B slots"], Bool[Array, " B"]]:
    """First tokens and lengths of the runs of equal ids of all rows, in order, counted over the batch.

    Returns:
      starts (B, most + 1) int32, B * T where there are no more runs; lengths (B, most) int32, 0 there; and (B,) bool,
      False for rows of more than ``most`` runs, of which the last counted one goes to the end of the row.
    """
    B, T = segment_ids.shape
    new = jnp.concatenate([jnp.ones((B, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    run = jnp.cumsum(new, axis=1, dtype=jnp.int32)
    first = jnp.ravel(new & (run <= most))
    starts = jnp.nonzero(first, size=B * (most + 1), fill_value=B * T)[0].astype(jnp.int32)
    lengths = jnp.diff(starts)[: B * most]
    return starts.reshape(B, most + 1), lengths.reshape(B, most), run[:, -1] <= most


@jax.custom_vjp
def _fused(q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, lengths: jax.Array) -> jax.Array:
    operands = (q, k, v, *_segment_operands(q, k, starts, lengths))
    return _call("__cudnn$fmhaSoftmax", PRODUCTS, operands, (q,), (), lengths.shape[1])[0]


def _save(q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Any]:
    (B, T, H, _), most = q.shape, lengths.shape[1]
    operands = (q, k, v, *_segment_operands(q, k, starts, lengths))
    out, lse = _call("__cudnn$fmhaSoftmax", PRODUCTS, operands, (q,), ((B * most, H, T),), most)
    out, lse = checkpoint_name(out, "context"), checkpoint_name(lse, "lse")  # here, or a remat runs the kernel again
    return out, (q, k, v, starts, lengths, out, lse)


def _backward(saved: tuple[jax.Array, ...], given: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, starts, lengths, out, lse = saved
    operands = (q, k, v, lse, given, out, *_segment_operands(q, k, starts, lengths))
    grads = _call("__cudnn$fmhaSoftmaxBackward", PRODUCTS_BACKWARD, operands, (q, k, v), (), lengths.shape[1])
    return *grads, None, None


_fused.defvjp(_save, _backward)


def _segment_operands(q: jax.Array, k: jax.Array, starts: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """Lengths in q and k, and offsets in elements of q and of k: a token of k has its own number of heads."""
    return lengths, lengths, starts * (q.shape[2] * q.shape[3]), starts * (k.shape[2] * k.shape[3])


def _call(
    target: str,
    products: dict[str, Any],
    operands: tuple[jax.Array, ...],
    like: tuple[jax.Array, ...],
    statistics: tuple[tuple[int, ...], ...],
    most: int,
) -> list[jax.Array]:
    """Results shaped as ``like`` (B, T, heads, hd), then ``statistics`` in float32; the workspace is dropped."""

    def results(*like: jax.Array) -> list[jax.Array]:
        one = like[0][0, 0, 0, 0]  # its axes of shard_map are those of all results
        others = [jnp.full(shape, one, jnp.float32) for shape in statistics]
        return [*(x.transpose(HEADS_THIRD) for x in like), *others, jnp.full(0, one, jnp.uint8)]

    call: Callable[..., list[jax.Array]] = jax.ffi.ffi_call(
        target,
        jax.eval_shape(results, *like),
        output_layouts=[HEADS_THIRD] * len(like) + [None] * (len(statistics) + 1),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(_config(operands[0], products, most)),
    )
    out = call(*operands)
    return [x.transpose(HEADS_THIRD) for x in out[: len(like)]] + list(out[len(like) : -1])


def _config(q: jax.Array, products: dict[str, Any], most: int) -> dict[str, Any]:
    """XLA's ``GpuBackendConfig`` (``xla/service/gpu/backend_configs.proto``)."""
    B, T, H, hd = q.shape
    scores = {
        "element_type": {"bfloat16": "BF16", "float16": "F16"}[q.dtype.name],
        "dimensions": [str(B), str(H), str(T), str(T)],
        "layout": {"minor_to_major": ["3", "2", "1", "0"]},
        "is_dynamic_dimension": [False] * 4,
    }
    attention = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": hd**-0.5,
        "intermediate_tensor_shape": scores,
        "is_flash_attention": True,
        "mask_type": "PADDING_CAUSAL",
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": 0,
        "max_seg_per_batch": most,
        "is_paged_attention": False,
        **{f"{name}_dot_dimension_numbers": _dimensions(*axes) for name, axes in products.items()},
    }
    return {"operation_queue_id": "0", "cudnn_fmha_backend_config": attention}


def _dimensions(contracted: tuple[int, int], batch: tuple[tuple[int, int], tuple[int, int]]) -> dict[str, list[str]]:
    """XLA's ``DotDimensionNumbers``."""
    return {
        "lhs_contracting_dimensions": [str(contracted[0])],
        "rhs_contracting_dimensions": [str(contracted[1])],
        "lhs_batch_dimensions": [str(i) for i in batch[0]],
        "rhs_batch_dimensions": [str(i) for i in batch[1]],
    }
