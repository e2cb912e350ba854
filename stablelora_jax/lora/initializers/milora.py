"""MiLoRA: the pair starts as the r *smallest* singular triplets of the kernel (Wang et al., arXiv 2406.09044).

As PiSSA from the other end: ``A = U_r sqrt(S_r / s)``, ``B = sqrt(S_r / s) V_r^T`` of the last r triplets, the smallest
first. What the kernel knows best is left alone. As in :mod:`.pissa`, ``s A0 B0`` stays subtracted and the base is not
moved.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank, subtracted
from stablelora_jax.utils.singular import decomposed


def milora(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from the values of the kernel ``w`` (in, out).

    Raises:
      InputError: the kernel has fewer singular values than the rank.
    """
    require_rank("milora", w, rank)
    u, s, vt = decomposed(w)
    u, s, vt = u[:, ::-1][:, :rank], s[::-1][:rank], vt[::-1][:rank]  # the smallest first
    root = jnp.sqrt(s / scale)
    return subtracted((u * root[None]).astype(dtype), (root[:, None] * vt).astype(dtype))
