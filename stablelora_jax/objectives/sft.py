"""Supervised fine-tuning: the negative log-likelihood of completions."""

from __future__ import annotations

import jax
from jaxtyping import Float


def sft(completion: Float[jax.Array, " B"]) -> Float[jax.Array, " B"]:
    """``-log p`` of each completion.

    Args:
      completion: log-probabilities of completions, summed over their tokens.
    """
    return -completion
