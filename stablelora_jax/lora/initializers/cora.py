"""CoRA: ``A = 0`` and B an orthonormal basis that all layers share, ``dW = s A B`` (Xiao et al., arXiv 2409.02119).

The paper takes the basis from a singular value decomposition of the kernels of several models. Here it is that of all
layers' kernels of a kind, one below the other, (layers * in, out): B are its r first right singular vectors. With
``freeze=["lora_b"]`` that is the paper's first method, which trains A alone; without, its second.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.initializers.start import require_rank
from stablelora_jax.utils.singular import decomposed


def cora(key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A pair from what the kernels of its kind have in common, ``w`` (in, out), as :func:`common` gives it.

    Raises:
      InputError: the kernel has fewer directions than the rank.
    """
    require_rank("cora", w, rank)
    return {"lora_a": jnp.zeros((w.shape[0], rank), dtype), "lora_b": decomposed(w)[2][:rank].astype(dtype)}


def common(kernels: list[jax.Array]) -> jax.Array:
    """The best (in, out) of all kernels (layers..., in, out) of a kind, one below the other: rows ``S_i v_i^T``.

    They are computed from the sum of ``W^T W``, so that the kernels are never beside one another.
    """
    size = kernels[0].shape[-2:]
    wide = jnp.promote_types(kernels[0].dtype, jnp.float32)
    rows = (kernel.astype(wide).reshape(-1, size[1]) for kernel in kernels)
    gram = sum(jnp.matmul(own.T, own, precision="highest") for own in rows)
    values, vectors = jnp.linalg.eigh(gram)
    best = jnp.sqrt(jnp.maximum(values, 0))[::-1, None] * vectors.T[::-1]
    return jnp.pad(best[: size[0]], [(0, max(0, size[0] - size[1])), (0, 0)])
