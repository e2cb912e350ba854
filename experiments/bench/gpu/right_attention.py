"""Correctness of attention: every implementation that the device supports, compared with dense attention in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.right import FLOAT32_TOLERANCE, check_bounds, relative_error
from stablelora_jax.models.attention import self_attention


def attention(*, toy: bool = False) -> dict[str, Any]:
    """Outputs and gradients in bfloat16, for ``blockwise`` also in float32; with one document per row, and packed.

    In bfloat16 an implementation may differ from float32 by twice as much as dense attention does.
    """
    kinds = ("blockwise", "cudnn") if jax.default_backend() == "gpu" else ("blockwise",)
    differences: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for problem in [(1, 64, 4, 2, 16)] if toy else [(2, 1024, 14, 2, 64), (1, 1024, 32, 8, 128)]:
        _compare(problem, kinds, differences, bounds)
    absent = {} if "cudnn" in kinds else {"cudnn": f"needs a gpu, the backend is {jax.default_backend()}"}
    return check_bounds(differences, bounds) | {"absent": absent}


def _compare(
    problem: tuple[int, ...], kinds: tuple[str, ...], differences: dict[str, float], bounds: dict[str, float]
) -> None:
    """Add the differences and bounds of one shape."""
    run, packed = _problem(*problem)
    for rows, segments in {"one text": None, "packed": packed}.items():
        name = f"{rows}, head_dim {problem[-1]}"
        with jax.default_matmul_precision("highest"):
            exact = run("xla", "float32", segments)
            differences[f"blockwise, float32, {name}"] = relative_error(run("blockwise", "float32", segments), exact)
        bounds[f"blockwise, float32, {name}"] = FLOAT32_TOLERANCE
        half = differences[f"xla, bfloat16, {name}"] = relative_error(run("xla", "bfloat16", segments), exact)
        for kind in kinds:
            differences[f"{kind}, bfloat16, {name}"] = relative_error(run(kind, "bfloat16", segments), exact)
            bounds[f"{kind}, bfloat16, {name}"] = 2 * half


def _problem(B: int, T: int, H: int, K: int, hd: int) -> tuple[Callable[..., Any], np.ndarray]:
    """``(run, segments)``: ``run(kind, dtype, segments)`` returns outputs and gradients; segments of packed rows.

    In the packed rows the last segment is padding (id 0).
    """
    rng = np.random.default_rng(0)
    q, k, v, out = (rng.normal(size=(B, T, heads, hd)).astype(np.float32) for heads in (H, K, K, H))
    ends = np.sort(rng.choice(np.arange(1, T), (B, 5), replace=False))
    packed = (np.arange(T) >= ends[..., None]).sum(1).astype(np.int32) + 1

    def run(kind: str, dtype: str, segments: np.ndarray | None) -> Any:
        mask = 1 if segments is None else (segments > 0)[..., None, None]

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = self_attention(q, k, v, segments, kind=kind, segments=8) * mask
            return (found.astype(jnp.float32) * out).sum(), found

        given = [jnp.asarray(x, dtype) for x in (q, k, v)]
        (_, found), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*given)
        return found, gradients

    return run, np.where(packed == packed.max(), 0, packed)
