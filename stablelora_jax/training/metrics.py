"""Norms of the adapter pairs, as metrics of a training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.lora.pairs import pairs

NORMS = tuple(f"norm_{letter}{end}" for letter in "ab" for end in ("", "_min", "_max"))


def norm_summary(adapters: optax.Params) -> dict[str, jax.Array]:
    """Mean, minimum and maximum Frobenius norm of A and of B over all pairs without padding: float32 scalars."""
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
