"""ALLoRA: rows of B that are near zero learn faster (Huang and Balestriero, arXiv 2410.09692). ::

    c_i = 1 / sqrt(||B_i|| + 1 / eta^2)        for each output i, from B as it stands;  c_i = eta where B_i = 0

AdamW, with c_i multiplying output i's part of B. ALLoRA is meant to do without dropout and without alpha / r: use
``LoraSpec(dropout=0, alpha=rank)``. There is no code of the authors. Under Adam a factor that stays constant cancels,
so ``applies_to="gradient"``, the paper's words, acts through the changes of c_i alone; ``applies_to="update"``
multiplies Adam's step. The abstract may also be read as c_i on each output's gradient, which would reach gA too;
that needs the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.pair_tree import map_pairs
from stablelora_jax.utils.errors import InputError


def allora(
    learning_rate: optax.ScalarOrSchedule,
    eta: float = 2.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    applies_to: Literal["gradient", "update"] = "gradient",
) -> optax.GradientTransformationExtraArgs:
    """AdamW with ALLoRA's row factors on B; leaves outside pairs get AdamW.

    Args:
      learning_rate: scalar or schedule.
      eta: the factor of a row of zeros.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule.
      applies_to: what c multiplies: B's gradient, or the step that Adam makes of it.

    Raises:
      InputError: a number out of range, an unknown ``applies_to``.
    """
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    if applies_to not in ("gradient", "update"):
        raise InputError(f"applies_to must be gradient or update, not {applies_to!r}")
    adam = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
    adam.insert(0 if applies_to == "gradient" else 1, scale_rows_by_norm(eta))
    decayed = optax.add_decayed_weights(weight_decay)
    return of_pairs(optax.chain(*adam, decayed, optax.scale_by_learning_rate(learning_rate)))


def scale_rows_by_norm(eta: float = 2.0) -> optax.GradientTransformation:
    """Multiply the update of B by c, (..., 1, out), of B as it stands; all else passes unchanged."""
    require_numbers(eta=eta)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise InputError("allora needs the parameters: call update(updates, state, params)")

        def scaled(pair: Mapping[str, jax.Array], step: Any) -> Any:
            b = pair["lora_b"]
            b = b.astype(jnp.promote_types(b.dtype, jnp.float32))
            c = 1 / jnp.sqrt(jnp.linalg.norm(b, axis=-2, keepdims=True) + eta**-2.0)
            return type(step)({**step, "lora_b": (c * step["lora_b"]).astype(step["lora_b"].dtype)})

        return map_pairs(scaled, params, updates, other=lambda _, leaf: leaf), state

    def init(params: Any) -> optax.EmptyState:
        map_pairs(lambda pair: None, params)  # refuses what makes no pair
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)
