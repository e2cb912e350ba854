"""Init[B]: ``A = 0``, ``B ~ N(0, 1/r)``, so that step 0 *is* the base model (Hayou et al., arXiv 2406.08447).

The first step moves A alone. The paper finds it stable only at learning rates of 1/in, where B learns too little.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def init_b(key: jax.Array, w: Any, rank: int, scale: Any, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair for the kernel ``w`` (in, out), of which only the shape is read."""
    rows, columns = w.shape
    b = jax.random.normal(key, (rank, columns), dtype) * rank**-0.5
    return {"lora_a": jnp.zeros((rows, rank), dtype), "lora_b": b}
