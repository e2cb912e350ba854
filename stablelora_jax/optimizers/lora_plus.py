"""LoRA+: B learns faster than A (Hayou, Ghosh, Yu, ICML 2024, arXiv 2402.12354; reference ``lora_plus.py``). ::

    A <- AdamW(A, gA) at learning rate eta,    B <- AdamW(B, gB) at learning rate ratio * eta

Decoupled weight decay is multiplied by a factor's own rate, so B decays ``ratio`` times faster, as in the reference.
Leaves outside pairs learn at eta, as A does (the reference gives vectors the ratio and no decay). With ``eps = 0``, no
decay and B = 0 at the start this is *exactly* Adam with the LoRA scale s multiplied by the ratio.
"""

from __future__ import annotations

import optax

from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.pair_tree import label_factors


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    ratio: optax.ScalarOrSchedule = 16.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a higher learning rate for B.

    Args:
      learning_rate: eta, scalar or schedule.
      ratio: B's learning rate over A's, lambda, scalar or schedule; the paper's is 2^4, with eta lowered to match.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule.

    Raises:
      InputError: a number out of range; in ``init``, what makes no pair.
    """
    require_numbers(ratio=ratio, learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    faster = optax.scale_by_schedule(ratio) if callable(ratio) else optax.scale(ratio)

    def only_b(params: object) -> object:
        return label_factors(params, "slow", "fast", "slow")

    return of_pairs(
        optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
            optax.add_decayed_weights(weight_decay),
            optax.partition({"slow": optax.identity(), "fast": faster}, only_b),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
