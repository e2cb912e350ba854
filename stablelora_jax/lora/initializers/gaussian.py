"""PEFT's ``init_lora_weights="gaussian"``: ``A ~ N(0, 1/r^2)``, ``B = 0`` (``reset_lora_parameters``)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def gaussian(key: jax.Array, w: Any, rank: int, scale: Any, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair for the kernel ``w`` (in, out), of which only the shape is read."""
    rows, columns = w.shape
    return {"lora_a": jax.random.normal(key, (rows, rank), dtype) / rank, "lora_b": jnp.zeros((rank, columns), dtype)}
