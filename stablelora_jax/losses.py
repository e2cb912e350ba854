"""Next-token cross-entropy on the tokens that a loss mask names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def token_log_probs(logits: jax.Array, tokens: ArrayLike) -> jax.Array:
    """Log-probability, in the dtype of ``logits``, of each token given those before it.

    Args:
      logits: (B, T, V), float32 or wider.
      tokens: (B, T) int32.

    Returns:
      (B, T): entry t belongs to ``tokens[:, t]``; entry 0, which nothing predicts, is 0.
    """
    logits, targets = logits[:, :-1], jnp.asarray(tokens)[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.pad(chosen - jax.nn.logsumexp(logits, axis=-1), ((0, 0), (1, 0)))


def masked_cross_entropy(logits: jax.Array, tokens: ArrayLike, loss_mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """``(sum of -log p over the tokens whose loss_mask is 1, their number)``, both scalars in the dtype of ``logits``.

    The sum, not the mean: a mean over devices or micro-batches of unequal token counts is not the batch's mean.
    """
    mask = jnp.asarray(loss_mask, logits.dtype).at[:, 0].set(0)
    return -(token_log_probs(logits, tokens) * mask).sum(), mask.sum()
