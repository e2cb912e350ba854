"""How tensors of several adapters become one: a rule is what is pruned and whether a sign is elected.

==================  ========  ======  ====================================================
method              prune     elect   paper
==================  ========  ======  ====================================================
``linear``                            task arithmetic, arXiv 2212.04089
``ties``            largest   yes     TIES-Merging, arXiv 2306.01708
``dare_linear``     random            DARE, arXiv 2311.03099: what is kept is divided by the density
``dare_ties``       random    yes     both
``magnitude_prune`` largest           PEFT's own
==================  ========  ======  ====================================================

The arithmetic is PEFT's (``peft/utils/merge_utils.py``): signs are elected among the pruned tensors before they are
weighted, and the mean is taken over those that agree. TIES itself elects among and averages the *weighted* ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """One row of the table above."""

    prune: str | None  # "largest", "random" or None
    elect: bool


RULES = {
    "linear": Rule(None, False),
    "ties": Rule("largest", True),
    "dare_linear": Rule("random", False),
    "dare_ties": Rule("random", True),
    "magnitude_prune": Rule("largest", False),
}


def keep_largest(x: jax.Array, count: jax.Array) -> jax.Array:
    """Bool mask, shaped as ``x``, of its ``count`` greatest magnitudes; among equals the first in C order."""
    order = jnp.argsort(-jnp.abs(x).reshape(-1), stable=True)
    return jnp.zeros(x.size, bool).at[order].set(jnp.arange(x.size) < count).reshape(x.shape)


def keep_random(key: jax.Array, shape: tuple[int, ...], density: float) -> jax.Array:
    """Bool mask of ``shape``, each entry True with probability ``density``."""
    return jax.random.bernoulli(key, density, shape)


def mix(tensors: jax.Array, weights: jax.Array, sign: str | None) -> jax.Array:
    """One tensor of N pruned ``tensors`` (N, ...) with ``weights`` (N,), or (N, ...) with axes of 1.

    Args:
      tensors: the tensors of one module; zeros where an adapter has none.
      weights: of each; not part of the election.
      sign: None for the weighted sum. Else, at each entry, the mean over those tensors whose sign is the majority's:
        that of their sum (``"total"``) or of the sum of their signs (``"frequency"``), positive where it is zero.
    """
    weighted = tensors * weights.reshape(*weights.shape, *(1,) * (tensors.ndim - weights.ndim))
    if sign is None:
        return weighted.sum(0)
    votes = tensors if sign == "total" else jnp.sign(tensors)
    agree = jnp.sign(tensors) == jnp.where(votes.sum(0, keepdims=True) >= 0, 1, -1)
    return (weighted * agree).sum(0) / jnp.maximum(agree.sum(0), 1)
