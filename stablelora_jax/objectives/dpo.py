"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290), with the losses of its relatives.

With h = log p(chosen) - log p(rejected), less the same of the reference model::

    sigmoid   -(1 - e) log sigma(beta h) - e log sigma(-beta h)     DPO, equation 7; e > 0 is its conservative form
    ipo       (h - 1 / (2 beta))^2                                  IPO (Azar et al., arXiv 2310.12036, equation 17)
    hinge     max(0, 1 - beta h)                                    SLiC (Zhao et al., arXiv 2305.10425)

h is of summed log-probabilities, as in the papers. TRL's ``ipo`` is of averages: pass those for it.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from stablelora_jax.objectives.checks import matching, require_number
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError

LossType = Literal["sigmoid", "ipo", "hinge"]


@checked
def dpo(
    chosen: Float[ArrayLike, " B"],
    rejected: Float[ArrayLike, " B"],
    ref_chosen: Float[ArrayLike, " B"],
    ref_rejected: Float[ArrayLike, " B"],
    *,
    beta: float | jax.Array = 0.1,
    label_smoothing: float | jax.Array = 0.0,
    loss_type: str = "sigmoid",
) -> Float[jax.Array, " B"]:
    """The loss of each pair; ``log 2`` where the model is the reference, for ``sigmoid``.

    Args:
      chosen: log-probabilities of the preferred completions, summed over their tokens.
      rejected: of the others.
      ref_chosen: of the preferred ones under the reference model.
      ref_rejected: of the others under it.
      beta: the strength of the reference; of ``ipo`` the paper's tau.
      label_smoothing: e, the share of pairs that are labelled the wrong way round, for ``sigmoid``.
      loss_type: ``sigmoid``, ``ipo`` or ``hinge``.

    Raises:
      InputError: an unknown loss type, shapes that differ, or a number out of range.

    Example::

      >>> import jax.numpy as jnp
      >>> dpo(*(jnp.zeros(2) for _ in range(4))).round(4).tolist()
      [0.6930999755859375, 0.6930999755859375]
    """
    chosen, rejected, ref_chosen, ref_rejected = matching(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    require_number("beta", beta, 0)
    require_number("label_smoothing", label_smoothing, 0, 0.5, closed=True)
    if loss_type not in get_args(LossType):
        raise InputError(f"loss_type must be one of {', '.join(get_args(LossType))}, not {loss_type!r}")
    if loss_type != "sigmoid" and isinstance(label_smoothing, float | int) and label_smoothing:
        raise InputError(f"label_smoothing belongs to loss_type 'sigmoid', not to {loss_type!r}: leave it out")
    h = (chosen - rejected) - (ref_chosen - ref_rejected)
    if loss_type == "ipo":
        return jnp.square(h - 1 / (2 * beta))
    if loss_type == "hinge":
        return jax.nn.relu(1 - beta * h)
    kept, flipped = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped
