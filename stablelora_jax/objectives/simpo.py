"""SimPO: a reference-free preference loss of length-normalised rewards (Meng et al., arXiv 2405.14734, equation 6).

``-log sigma(beta (log p(chosen) / |chosen| - log p(rejected) / |rejected|) - gamma)``.
"""

from __future__ import annotations

import jax
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from stablelora_jax.objectives.checks import matching, require_number
from stablelora_jax.utils.checked import checked


@checked
def simpo(
    chosen: Float[ArrayLike, " B"],
    rejected: Float[ArrayLike, " B"],
    chosen_length: Shaped[ArrayLike, " B"],
    rejected_length: Shaped[ArrayLike, " B"],
    *,
    beta: float | jax.Array = 2.0,
    gamma: float | jax.Array = 1.0,
) -> Float[jax.Array, " B"]:
    """The loss of each pair.

    Args:
      chosen: log-probabilities of the preferred completions, summed over their tokens.
      rejected: of the others.
      chosen_length: tokens of the preferred completions.
      rejected_length: of the others.
      beta: the scale of the reward.
      gamma: the margin by which rewards shall differ; the paper has gamma / beta of about 0.5.

    Raises:
      InputError: shapes that differ, or a number out of range.
    """
    chosen, rejected, chosen_length, rejected_length = matching(
        chosen=chosen, rejected=rejected, chosen_length=chosen_length, rejected_length=rejected_length
    )
    require_number("beta", beta, 0)
    require_number("gamma", gamma, 0, closed=True)
    margin = chosen / chosen_length - rejected / rejected_length
    return -jax.nn.log_sigmoid(beta * margin - gamma)
