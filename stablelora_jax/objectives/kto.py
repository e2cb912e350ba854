"""KTO: completions that are desirable or not, one by one (Ethayarajh et al., arXiv 2402.01306, section 4.2).

With r = log p - log p of the reference, and the reference point z0, an estimate of their divergence::

    desirable      lambda_d (1 - sigma(beta (r - z0)))
    undesirable    lambda_u (1 - sigma(beta (z0 - r)))
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from stablelora_jax.objectives.checks import matching, require_number
from stablelora_jax.utils.checked import checked


@checked
def kto(
    completion: Float[ArrayLike, " B"],
    ref_completion: Float[ArrayLike, " B"],
    desirable: Bool[ArrayLike, " B"],
    reference_point: Float[ArrayLike, ""] | float,
    *,
    beta: float | jax.Array = 0.1,
    lambda_d: float | jax.Array = 1.0,
    lambda_u: float | jax.Array = 1.0,
) -> Float[jax.Array, " B"]:
    """The loss of each completion.

    Args:
      completion: log-probabilities of completions, summed over their tokens.
      ref_completion: the same under the reference model.
      desirable: whether each is desirable.
      reference_point: z0, as :func:`kto_reference_point` estimates it; no gradient flows through it.
      beta: the aversion to risk.
      lambda_d: the weight of desirable completions; ``desirable_weight`` in TRL.
      lambda_u: of the others.

    Raises:
      InputError: shapes that differ, or a number out of range.
    """
    completion, ref_completion, desirable = matching(
        completion=completion, ref_completion=ref_completion, desirable=desirable
    )
    require_number("beta", beta, 0)
    require_number("lambda_d", lambda_d, 0, closed=True)
    require_number("lambda_u", lambda_u, 0, closed=True)
    above = completion - ref_completion - jax.lax.stop_gradient(reference_point)
    signed = jnp.where(desirable, above, -above)
    return jnp.where(desirable, lambda_d, lambda_u) * (1 - jax.nn.sigmoid(beta * signed))


def kto_reference_point(
    mismatched: Float[ArrayLike, " B"], ref_mismatched: Float[ArrayLike, " B"]
) -> Float[jax.Array, ""]:
    """z0: the divergence from the reference model, at least 0, estimated from completions of other prompts.

    Args:
      mismatched: log-probabilities of the completions, each after the prompt of another one of the batch.
      ref_mismatched: the same under the reference model.
    """
    mismatched, ref_mismatched = matching(mismatched=mismatched, ref_mismatched=ref_mismatched)
    found: jax.Array = jnp.maximum((mismatched - ref_mismatched).mean(), 0)
    return jax.lax.stop_gradient(found)
