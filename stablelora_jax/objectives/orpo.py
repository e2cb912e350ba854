"""ORPO: a likelihood and an odds ratio, without a reference model (Hong et al., arXiv 2403.07691).

With P = exp(log p / length), the geometric mean of a completion's token probabilities (equation 3), and odds = P / (1 -
P)::

    -log P(chosen) - weight * log sigma(log odds(chosen) - log odds(rejected))          (equations 6 and 7)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from stablelora_jax.objectives.checks import matching, require_number
from stablelora_jax.utils.checked import checked


@checked
def orpo(
    chosen: Float[ArrayLike, " B"],
    rejected: Float[ArrayLike, " B"],
    chosen_length: Shaped[ArrayLike, " B"],
    rejected_length: Shaped[ArrayLike, " B"],
    *,
    weight: float | jax.Array = 0.1,
) -> Float[jax.Array, " B"]:
    """The loss of each pair.

    Args:
      chosen: log-probabilities of the preferred completions, summed over their tokens.
      rejected: of the others.
      chosen_length: tokens of the preferred completions.
      rejected_length: of the others.
      weight: of the odds ratio, the paper's lambda; ``beta`` in TRL.

    Raises:
      InputError: shapes that differ, or a number out of range.
    """
    chosen, rejected, chosen_length, rejected_length = matching(
        chosen=chosen, rejected=rejected, chosen_length=chosen_length, rejected_length=rejected_length
    )
    require_number("weight", weight, 0, closed=True)
    chosen, rejected = chosen / chosen_length, rejected / rejected_length
    return -chosen - weight * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(log_p: jax.Array) -> jax.Array:
    """``log (p / (1 - p))``; exact for p near 0 and near 1, and finite at 1."""
    log_p = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).eps)
    near_one = log_p > -jnp.log(2.0)
    small = jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, log_p)))
    large = jnp.log(-jnp.expm1(jnp.where(near_one, log_p, -1.0)))
    return log_p - jnp.where(near_one, large, small)
