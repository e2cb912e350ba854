"""LoRA-GA: the pair starts along the gradient of its kernel (Wang et al., arXiv 2407.05000).

Of the kernel's gradient ``G = U S V^T`` (in, out), averaged over calibration batches, ``A = k U_{1:r}`` and
``B = k V_{r+1:2r}^T`` with ``k = out^(1/4) / sqrt(gamma)``: the first step of plain gradient descent changes ``s A B``
by ``-eta s^2 k^2`` times the best approximation of rank 2r of G, which is the paper's aim. The rule, its "stable"
scale and ``gamma = 16`` are those of the authors' code (``Outsider565/LoRA-GA``, ``ArB2r``); PEFT's port multiplies B
by the singular values and scales B alone, so that its first step is not that approximation. The authors move the base
to ``W - s A0 B0``; here that product stays subtracted.
"""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank, subtracted
from stablelora_jax.utils.singular import decomposed

GAMMA = 16


def lora_ga(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from the gradient ``w`` (in, out) of the kernel.

    Raises:
      InputError: the kernel has fewer than twice as many directions as the rank.
    """
    require_rank("lora_ga", w, 2 * rank)
    u, _, vt = decomposed(w)
    k = w.shape[1] ** 0.25 / GAMMA**0.5
    return subtracted((k * u[:, :rank]).astype(dtype), (k * vt[rank : 2 * rank]).astype(dtype))
