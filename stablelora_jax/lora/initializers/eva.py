"""EVA: A starts as the principal axes of the module's inputs, ``B = 0`` (Paischer et al., arXiv 2410.07170).

The authors run an incremental PCA over the inputs of the loss tokens, which centres them although the text says SVD
(``ml-jku/EVA``, ``peft/tuners/lora/eva.py``); of all batches together that is the decomposition of the centred inputs,
here computed exactly. ``w`` has their principal axes as columns, each times its singular value. Ranks by explained
variance, the other half of the paper, are :mod:`stablelora_jax.rank_allocation.eva`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank
from stablelora_jax.utils.singular import decomposed


def eva(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from the principal axes ``w`` (in, out) of the inputs of the kernel.

    Raises:
      InputError: the kernel has fewer directions than the rank.
    """
    require_rank("eva", w, rank)
    return {"lora_a": decomposed(w)[0][:, :rank].astype(dtype), "lora_b": jnp.zeros((rank, w.shape[1]), dtype)}
