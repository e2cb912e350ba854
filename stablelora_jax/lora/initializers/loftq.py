"""LoftQ: the pair starts as what quantisation took from the kernel (Li et al., arXiv 2310.08659, algorithm 1, T = 1).

``w = W - Q``, with Q what the quantised kernel stands for, ``A = U_r sqrt(S_r / s)``, ``B = sqrt(S_r / s) V_r^T``: step
0 is *not* the quantised base but nearer to the base that was quantised. It is one iteration, as in PEFT's
``replace_lora_weights_loftq``; more of them quantise another base, which other adapters could not share. The paper and
PEFT have s = 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank
from stablelora_jax.utils.singular import decomposed


def loftq(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from the residual ``w`` (in, out) of the quantised kernel.

    Raises:
      InputError: the kernel has fewer directions than the rank.
    """
    require_rank("loftq", w, rank)
    u, s, vt = decomposed(w)
    root = jnp.sqrt(s[:rank] / scale)
    return {"lora_a": (u[:, :rank] * root[None]).astype(dtype), "lora_b": (root[:, None] * vt[:rank]).astype(dtype)}
