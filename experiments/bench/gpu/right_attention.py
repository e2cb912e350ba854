"""Does attention run right: every kind that the device has beside dense attention in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.right import FLOAT32, apart, judged
from stablelora_jax.models.attention import self_attention


def attention(*, toy: bool = False) -> dict[str, Any]:
    """Values and gradients in bfloat16, and of ``blockwise`` in float32; with one text a row, and packed.

    In bfloat16 a kind may be twice as far from float32 as the dense one is.
    """
    kinds = ("blockwise", "cudnn") if jax.default_backend() == "gpu" else ("blockwise",)
    differences: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for problem in [(1, 64, 4, 2, 16)] if toy else [(2, 1024, 14, 2, 64), (1, 1024, 32, 8, 128)]:
        _compare(problem, kinds, differences, bounds)
    absent = {} if "cudnn" in kinds else {"cudnn": f"needs a gpu, and here is a {jax.default_backend()}"}
    return judged(differences, bounds) | {"absent": absent}


def _compare(
    problem: tuple[int, ...], kinds: tuple[str, ...], differences: dict[str, float], bounds: dict[str, float]
) -> None:
    """Add what one shape gives."""
    run, packed = _problem(*problem)
    for rows, segments in {"one text": None, "packed": packed}.items():
        name = f"{rows}, head_dim {problem[-1]}"
        with jax.default_matmul_precision("highest"):
            exact = run("xla", "float32", segments)
            differences[f"blocks, float32, {name}"] = apart(run("blockwise", "float32", segments), exact)
        bounds[f"blocks, float32, {name}"] = FLOAT32
        half = differences[f"xla, bfloat16, {name}"] = apart(run("xla", "bfloat16", segments), exact)
        for kind in kinds:
            differences[f"{kind}, bfloat16, {name}"] = apart(run(kind, "bfloat16", segments), exact)
            bounds[f"{kind}, bfloat16, {name}"] = 2 * half


def _problem(B: int, T: int, H: int, K: int, hd: int) -> tuple[Callable[..., Any], np.ndarray]:
    """``(run(kind, dtype, segments) -> values and gradients, segments of packed rows)``; the last are pads."""
    rng = np.random.default_rng(0)
    q, k, v, out = (rng.normal(size=(B, T, heads, hd)).astype(np.float32) for heads in (H, K, K, H))
    ends = np.sort(rng.choice(np.arange(1, T), (B, 5), replace=False))
    packed = (np.arange(T) >= ends[..., None]).sum(1).astype(np.int32) + 1

    def run(kind: str, dtype: str, segments: np.ndarray | None) -> Any:
        kept = 1 if segments is None else (segments > 0)[..., None, None]

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = self_attention(q, k, v, segments, kind=kind, segments=8) * kept
            return (found.astype(jnp.float32) * out).sum(), found

        given = [jnp.asarray(x, dtype) for x in (q, k, v)]
        (_, found), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*given)
        return found, gradients

    return run, np.where(packed == packed.max(), 0, packed)
