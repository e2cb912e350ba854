"""NLoRA's start: the Nystrom approximation of the kernel, in three factors (Guo et al., arXiv 2502.14482).

``W ~ A N B`` with ``A = W[:, :r]``, ``B = W[:r, :]`` and ``N = pinv(W[:r, :r])``, exact where W has rank r and its
corner too. N is the matrix of SLoRA and IntTune. The authors' code takes ``N = W[:r, :r]`` and leaves the product in
the function; here it stays subtracted, as in :mod:`.pissa`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank, subtracted


def nystrom(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from the values of the kernel ``w`` (in, out), and ``lora_n`` (rank, rank) between its factors.

    Raises:
      InputError: the kernel has fewer rows or columns than the rank.
    """
    require_rank("nystrom", w, rank)
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    pair = subtracted(w[:, :rank].astype(dtype), w[:rank].astype(dtype))
    return {**pair, "lora_n": jnp.linalg.pinv(w[:rank, :rank]).astype(dtype)}
