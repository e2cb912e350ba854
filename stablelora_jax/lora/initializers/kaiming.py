"""PEFT's default: ``A ~ U(-1/sqrt(in), 1/sqrt(in))``, ``B = 0``, so that step 0 *is* the base model.

PEFT writes it ``kaiming_uniform_(lora_A.weight, a=sqrt(5))`` (``peft/tuners/lora/layer.py:reset_lora_parameters``);
the bound is ``sqrt(6 / ((1 + 5) * in))``. Peers in JAX that use ``he_uniform`` start 2.45 times larger, which matters
to a method that is defined by the ratio of ||A|| to ||B||.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def kaiming(key: jax.Array, w: Any, rank: int, scale: Any, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair for the kernel ``w`` (in, out), of which only the shape is read."""
    rows, columns = w.shape
    bound = rows**-0.5
    a = jax.random.uniform(key, (rows, rank), dtype, -bound, bound)
    return {"lora_a": a, "lora_b": jnp.zeros((rank, columns), dtype)}
