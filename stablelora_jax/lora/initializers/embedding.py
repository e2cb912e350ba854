"""PEFT's start of a pair at an embedding: ``A = 0``, ``B ~ N(0, 1)``, so that step 0 *is* the base model.

The other way round than at a kernel (``peft/tuners/lora/layer.py:reset_lora_parameters``): the rows of A that a batch
does not look up get no gradient, so A is the factor that may be zero. Every initialisation of kernels starts embeddings
so.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def embedding(key: jax.Array, w: Any, rank: int, scale: Any, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair for the embedding ``w`` (vocabulary, features), of which only the shape is read."""
    rows, columns = w.shape
    return {"lora_a": jnp.zeros((rows, rank), dtype), "lora_b": jax.random.normal(key, (rank, columns), dtype)}
