"""LoLDU: of ``W0 = P L D U`` the first r entries of D are trained (Shi et al., arXiv 2410.13618).

The decomposition is of PEFT's weight (out, in): P a permutation of the outputs, L unit lower, D diagonal, U unit upper.
The change is ``s P L_r diag(z - z0) U_r``, z0 the first r of D, where z starts: the paper's residual with its product,
in which the base is not moved.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.utils.errors import InputError

PAIR, READS_KERNEL = "none", True
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: jax.Array, begun: Adapter, scale: Any) -> dict[str, jax.Array]:
    """``lora_z`` (r,), r numbers, as it begins, and the frozen factors U_r^T (in, r) and (P L_r)^T (r, out).

    Raises:
      InputError: the rank is more than the kernel has.
    """
    rank, dtype = begun["lora_a"].shape[1], begun["lora_a"].dtype
    if rank > min(w.shape):
        raise InputError(f"loldu takes {rank} pivots of a kernel {w.shape}: lower the rank")
    weight = w.T.astype(jnp.promote_types(w.dtype, jnp.float32))
    both, _, order = jax.lax.linalg.lu(weight)
    lower = jnp.tril(both[:, :rank], -1) + jnp.eye(weight.shape[0], rank, dtype=both.dtype)
    z = jnp.diagonal(both)[:rank].astype(dtype)
    pivots = jnp.diagonal(both)[:rank, None]
    upper = jnp.triu(both[:rank] / jnp.where(pivots == 0, 1, pivots), 1) + jnp.eye(rank, w.shape[0], dtype=both.dtype)
    permuted = jnp.zeros_like(lower).at[order].set(lower)
    return {"lora_z": z, "frozen_z": z, "frozen_a": upper.T.astype(dtype), "frozen_b": permuted.T.astype(dtype)}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """A = U_r^T, B = diag(z - z0) (P L_r)^T."""
    moved = adapter["lora_z"] - adapter["frozen_z"]
    return {"lora_a": adapter["frozen_a"], "lora_b": moved[:, None] * adapter["frozen_b"]}
