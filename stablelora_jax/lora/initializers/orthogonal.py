"""PEFT's ``init_lora_weights="orthogonal"``: neither factor is zero, and ``A B = 0`` (``orthogonal_init``).

The odd and the even rows of an orthogonal Q (r, r) span orthogonal spaces: ``A = X Q_odd / 10`` and
``B = Q_even^T Y / 10`` with X (in, r/2) and Y (r/2, out) normal. So both factors learn from the first step, which *is*
the base model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.utils.errors import InputError


def orthogonal(key: jax.Array, w: Any, rank: int, scale: Any, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair for the kernel ``w`` (in, out), of which only the shape is read.

    Raises:
      InputError: the rank is odd.
    """
    if rank % 2:
        raise InputError(f"init='orthogonal' halves the rank, which must be even, not {rank}")
    (rows, columns), keys = w.shape, jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank), dtype))[0]
    a = jax.random.normal(keys[1], (rows, rank // 2), dtype) @ q[0::2]
    b = q[1::2].T @ jax.random.normal(keys[2], (rank // 2, columns), dtype)
    return {"lora_a": a / 10, "lora_b": b / 10}
