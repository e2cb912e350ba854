"""Norms of the adapter pairs and the ratios that end their shrinking, as metrics of a training step."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax.lora.pairs import make_target_module, pairs
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils.tree import Path

NORMS = tuple(f"norm_{letter}{end}" for letter in "ab" for end in ("", "_min", "_max"))


def norm_summary(adapters: optax.Params) -> dict[str, jax.Array]:
    """Mean, minimum and maximum Frobenius norm of A and of B over all pairs without padding: float32 scalars.

    NaN where a parametrisation trains no pairs.
    """
    if not pairs(adapters):
        return dict.fromkeys(NORMS, jnp.full((), jnp.nan, jnp.float32))
    summary = {}
    real = [
        ((p["lora_a"] != 0).any(axis=(-2, -1)) | (p["lora_b"] != 0).any(axis=(-2, -1))).ravel()
        for p in pairs(adapters).values()
    ]
    used = jnp.concatenate(real)
    for letter in "ab":
        norms = [jnp.linalg.norm(pair[f"lora_{letter}"], axis=(-2, -1)).ravel() for pair in pairs(adapters).values()]
        values = jnp.concatenate(norms)
        summary[f"norm_{letter}"] = jnp.where(used, values, 0).sum() / jnp.maximum(used.sum(), 1)
        summary[f"norm_{letter}_min"] = jnp.where(used, values, jnp.inf).min()
        summary[f"norm_{letter}_max"] = jnp.where(used, values, 0).max()
    return summary


def stop_ratios(adapters: optax.Params) -> dict[Path, jax.Array]:
    """``(||A||_F / in) / (||B||_F / out)`` by path, each of the shape of its stack; infinite where B is zero.

    Stable-LoRA stops shrinking a pair at the first step that begins with a ratio below 1 (arXiv 2603.05204, section 4).
    """
    ratios = {}
    for path, pair in pairs(adapters).items():
        a, b = pair["lora_a"], pair["lora_b"]
        norm_a, norm_b = (jnp.linalg.norm(x, axis=(-2, -1)) for x in (a, b))
        ratios[path] = (norm_a * b.shape[-1]) / (norm_b * a.shape[-2])
    return ratios


def ratios_by_name(ratios: Mapping[Path, jax.Array], spec: LoraSpec) -> dict[str, float]:
    """``{dotted module name: ratio}`` of concrete ratios, one entry a layer; padding is left out."""
    named: dict[str, float] = {}
    for path, values in ratios.items():
        target = make_target_module(path, np.shape(values), (0, 0), spec)
        rows = zip(target.names, target.ranks, np.ravel(values), strict=True)
        named |= {name: float(value) for name, rank, value in rows if rank}
    return named
