"""Init[AB]: both factors uniform in ``+-1/sqrt(in)`` (arXiv 2505.23194).

``init_ab`` is the paper's *reset*: ``s A0 B0`` stays subtracted, so that step 0 is the base model. ``init_ab_off``
starts off it, by the noise ``s A0 B0``.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import subtracted


def init_ab(key: jax.Array, w: Any, rank: int, scale: Any, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair for the kernel ``w`` (in, out), of which only the shape is read."""
    pair = init_ab_off(key, w, rank, scale, dtype)
    return subtracted(pair["lora_a"], pair["lora_b"])


def init_ab_off(key: jax.Array, w: Any, rank: int, scale: Any, dtype: DTypeLike) -> dict[str, jax.Array]:
    """The same pair, with nothing subtracted: the function at step 0 is not that of the base."""
    rows, columns = w.shape
    bound, keys = rows**-0.5, jax.random.split(key)
    a = jax.random.uniform(keys[0], (rows, rank), dtype, -bound, bound)
    return {"lora_a": a, "lora_b": jax.random.uniform(keys[1], (rank, columns), dtype, -bound, bound)}
