"""PiSSA: the pair starts as the r principal singular triplets of the kernel (Meng et al., arXiv 2404.02948, section 3).

``W = U S V^T``, ``A = U_r sqrt(S_r / s)``, ``B = sqrt(S_r / s) V_r^T``, so that ``s A B`` is the best approximation of
rank r of W. The paper trains beside the residual ``W - s A0 B0``; here that product stays subtracted in the low-rank
path, which is the same function and neither moves the base nor rounds it. ``pissa_niter_4`` is PEFT's fast form: a
randomised decomposition with four power iterations (Halko et al., arXiv 0909.4061, algorithm 4.4).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import subtracted
from stablelora_jax.utils.singular import decomposed, signed

ITERATIONS, OVERSAMPLED = 4, 8


def pissa(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from the values of the kernel ``w`` (in, out); of a smaller kernel's rank the rest is zero."""
    return _split(*decomposed(w), rank, scale, dtype)


def pissa_niter_4(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """:func:`pissa` from a random sketch of ``w``: two thin products an iteration in the place of a decomposition."""
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    width = min(rank + OVERSAMPLED, *w.shape)
    q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
    for _ in range(ITERATIONS):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
    u, s, vt = decomposed(q.T @ w)
    return _split(*signed(q @ u, s, vt), rank, scale, dtype)


def _split(
    u: jax.Array, s: jax.Array, vt: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike
) -> dict[str, jax.Array]:
    root = jnp.sqrt(s[:rank] / scale)
    a, b = u[:, :rank] * root[None], root[:, None] * vt[:rank]
    lacking = rank - root.shape[0]
    a, b = jnp.pad(a, [(0, 0), (0, lacking)]), jnp.pad(b, [(0, lacking), (0, 0)])
    return subtracted(a.astype(dtype), b.astype(dtype))
