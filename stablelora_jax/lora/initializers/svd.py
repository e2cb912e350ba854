"""LoRA-XS's bases: ``A = U_r S_r``, ``B = V_r^T`` of the kernel's singular value decomposition (arXiv 2405.17604).

As the start of a trained pair, ``s A0 B0`` stays subtracted, as in :mod:`.pissa`, from which it differs in where the
singular values are.
"""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank, subtracted
from stablelora_jax.utils.singular import decomposed


def svd(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from the values of the kernel ``w`` (in, out).

    Raises:
      InputError: the kernel has fewer singular values than the rank.
    """
    require_rank("svd", w, rank)
    u, s, vt = decomposed(w)
    return subtracted((u[:, :rank] * s[None, :rank]).astype(dtype), vt[:rank].astype(dtype))
