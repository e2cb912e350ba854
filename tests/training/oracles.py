"""Definitions that the package's faster code is compared with."""

import jax.numpy as jnp

from stablelora_jax.training.cross_entropy import token_log_probs


def masked_cross_entropy(logits, tokens, loss_mask):
    """``(sum of -log p over the loss tokens, their number)``: scalars, in the dtype of ``logits`` (B, T, V)."""
    mask = jnp.asarray(loss_mask, logits.dtype).at[:, 0].set(0)
    return -(token_log_probs(logits, jnp.where(mask == 0, 0, tokens)) * mask).sum(), mask.sum()
