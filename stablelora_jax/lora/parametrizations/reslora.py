"""ResLoRA's block shortcut: a layer also uses the pairs of the layers before it (Shi et al., arXiv 2402.18039).

In layer n of a stack (along its first axis) ``dW_n = s sum_k A_n-k B_n-k``, k from 0 to ``previous``, as far as there
are layers: a pair of rank ``(previous + 1) r``, whose merging is exact. s is that of layer n. Of layers that are not
adapted there is no pair, and they use none. The input and middle shortcuts add what another layer was *given*, so that
merging them is an approximation: they are not here. ``previous`` is ``pre_num`` of the authors' code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "trained", False
OPTIONS = {"previous": 1}
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: jax.Array, begun: Adapter, scale: jax.Array, previous: int) -> dict[str, jax.Array]:
    """The pair as it begins; nothing else is trained."""
    return dict(begun)


def across(adapter: Adapter, used: np.ndarray, previous: int) -> dict[str, jax.Array]:
    """Each layer's factors beside those of the layers before: A (layers, ..., in, k r), B (layers, ..., k r, out).

    ``used`` (layers, ...): which layers are adapted.
    """
    count, keep = min(previous, len(used) - 1) + 1, used[..., None, None]
    found = {}
    for name, leaf in adapter.items():
        wide = _beside(jnp.where(keep, leaf, 0), count, -1 if name[-2:] == "_a" else -2)
        found[name] = jnp.where(keep, wide, 0)
    return found


def pair(adapter: Adapter, size: tuple[int, ...], previous: int) -> dict[str, jax.Array]:
    """The pair itself, or with its start where that stays subtracted."""
    return lora.pair(adapter, size)


def _beside(leaf: Float[Array, "layers ..."], count: int, axis: int) -> Float[Array, "layers ..."]:
    """Of each layer and the ``count - 1`` before it, along ``axis``; zeros before the first."""
    layers, rest = leaf.shape[0], [(0, 0)] * (leaf.ndim - 1)
    shifted = [jnp.pad(leaf[: layers - k], [(k, 0), *rest]) for k in range(count)]
    return jnp.concatenate(shifted, axis=axis)
