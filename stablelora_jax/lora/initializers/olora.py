"""OLoRA: the pair starts from the QR decomposition of the kernel (Buyukakyuz, arXiv 2406.01775).

PEFT decomposes its weight (out, in) as Q R: ``B = Q_r``, ``A = R_r``, the first r columns and rows, so ours (in, r) and
(r, out) are their transposes, and B has orthonormal rows. The factors are not divided by s. ``s A0 B0`` stays
subtracted and the base is not moved.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank, subtracted


def olora(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from the values of the kernel ``w`` (in, out).

    Raises:
      InputError: the kernel has fewer rows or columns than the rank.
    """
    require_rank("olora", w, rank)
    q, r = jnp.linalg.qr(w.astype(jnp.promote_types(w.dtype, jnp.float32)).T)
    sign = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)  # no decomposition fixes it
    return subtracted((sign[:, None] * r)[:rank].T.astype(dtype), (q * sign[None])[:, :rank].T.astype(dtype))
