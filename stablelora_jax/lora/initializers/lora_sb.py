"""LoRA-SB: LoRA-XS whose factors and R start as the first step of full fine-tuning (Ponkshe et al., arXiv 2411.19557).

``w = -eta sign(G)`` is the first step of AdamW along the summed gradient G of the kernel. Of ``w = U S V^T``,
``A = U_r``, ``B = V_r^T`` and ``R = diag(S_r) / s``, so that ``s A R B`` is the best approximation of rank r of that
step: step 0 is *not* the base but one step further, and the gradient of R is ``s A^T G B^T``, the projection of G. The
authors have s = 1. Their code rounds the factors to bfloat16 first; here they stay orthonormal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank
from stablelora_jax.utils.singular import decomposed


def lora_sb(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair and the matrix ``lora_r`` between its factors, from the first step ``w`` (in, out) of the kernel.

    Raises:
      InputError: the kernel has fewer directions than the rank.
    """
    require_rank("lora_sb", w, rank)
    u, s, vt = decomposed(w)
    r = jnp.diag(s[:rank] / scale)
    return {"lora_a": u[:, :rank].astype(dtype), "lora_b": vt[:rank].astype(dtype), "lora_r": r.astype(dtype)}
