"""What several starts share: a pair whose first product stays subtracted, and a check."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from stablelora_jax.utils.errors import InputError


def subtracted(a: Float[Array, "in r"], b: Float[Array, "r out"]) -> dict[str, jax.Array]:
    """The leaves of a pair that starts at ``a b`` without changing the function."""
    return {"lora_a": a, "lora_b": b, "frozen_a": a, "frozen_b": b}


def require_rank(init: str, w: jax.Array, rank: int) -> None:
    """Check that the kernel ``w`` (in, out) has ``rank`` directions to take.

    Raises:
      InputError: it has fewer rows or columns.
    """
    if rank > min(w.shape):
        raise InputError(f"init={init!r} takes {rank} directions of a kernel {w.shape}: lower the rank")
