"""Mask the Target: cross-entropy, and a divergence from the base that leaves out the target (arXiv 2605.29498).

With p of the base and q of the adapted model, for a target t: ``p~_v = p_v / (1 - p_t)`` and ``q~_v = q_v / (1 - q_t)``
for v != t. The loss is ``-log q_t + weight * KL(p~ || q~)``: what fights the cross-entropy, the probability of the
target itself, is left out. The paper's direction could not be read: base to adapted is ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from stablelora_jax.objectives.checks import require_number
from stablelora_jax.utils.checked import checked


@checked
def masked_target_kl(
    logits: Float[ArrayLike, "*tokens V"],
    base_logits: Float[ArrayLike, "*tokens V"],
    targets: Int[ArrayLike, "*tokens"],
    *,
    weight: float | jax.Array = 0.1,
) -> Float[jax.Array, "*tokens"]:
    """The loss of each token, in the dtype of the logits. No gradient reaches the base.

    Args:
      logits: of the adapted model, float32 or wider.
      base_logits: of the base.
      targets: the tokens to be predicted.
      weight: of the divergence.

    Raises:
      InputError: a weight below 0.
    """
    require_number("weight", weight, 0, closed=True)
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    base_logits = jax.lax.stop_gradient(jnp.asarray(base_logits))
    target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    log_q = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    p, q = (jnp.where(target, -jnp.inf, z) for z in (base_logits, logits))
    shares = jax.nn.softmax(p, axis=-1)
    gap = jnp.where(target, 0, base_logits - logits)
    divergence = (shares * gap).sum(axis=-1) - jax.nn.logsumexp(p, axis=-1) + jax.nn.logsumexp(q, axis=-1)
    return -log_q + weight * divergence
