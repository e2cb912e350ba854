"""LoRA-FA and FFA-LoRA: A stays as drawn, only B is trained (arXiv 2308.03303; 2403.12313, ICLR 2024). ::

    B <- AdamW(B, gB),    A and its optimizer state do not exist

FFA-LoRA is the same rule, chosen there because the average of B's over clients is then the exact average of A B.
``variant="peft"`` is PEFT's ``LoraFAOptimizer``: gB is projected, ``hB = gB (A^T A + 1e-8 I)^-1 / s^2``, so that the
kernel moves along G projected on the span of A; eps (PEFT: 1e-6) is added before the bias correction and decay comes
after the step. Frozen A at LoRA's learning rate learns too little: tune it anew.

An optimizer can leave A's gradient out of the update, not out of the backward pass: put :func:`freeze_a` around the
adapters inside the loss, and A's gradient, and the module inputs that it alone needs, are neither computed nor saved::

    grads = jax.grad(lambda adapters: loss(params, freeze_a(adapters)))(adapters)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, hf_adam, pairwise, value
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.linalg import inverses, times
from stablelora_jax.optimizers.pair_tree import Scale, label_factors, map_pairs, others_by_adamw
from stablelora_jax.utils.errors import InputError


class LoraFAState(NamedTuple):
    """Moments of B's projected gradient (..., out, r), for ``variant="peft"``."""

    mu: jax.Array
    nu: jax.Array


def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    variant: Literal["paper", "peft"] = "paper",
    scale: Scale = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on B and on leaves outside pairs; A's updates are zero and it has no state.

    Args:
      learning_rate: scalar or schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule.
      variant: the paper's rule or PEFT's.
      scale: the LoRA scale s, ``scales(adapters, spec)``, for PEFT's variant.

    Raises:
      InputError: a number out of range, an unknown variant, or a scale that is missing for a pair.
    """
    if variant not in ("paper", "peft"):
        raise InputError(f"variant must be paper or peft, not {variant!r}")
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    options = dict(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if variant == "paper":
        rules = {"frozen": optax.stateless(_stay), "trained": optax.adamw(learning_rate, **options)}
        return of_pairs(optax.partition(rules, lambda params: label_factors(params, "frozen", "trained", "trained")))

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, LoraFAState]]:
        del extra
        t, rate, decay = count + 1, value(learning_rate, count), value(weight_decay, count)
        results = []
        for g, inverse in zip(groups, inverses([g.params.a for g in groups], 1e-8), strict=True):
            h = times(g.grads.b, inverse) / g.scale[:, None, None] ** 2
            step = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)
            b, mu, nu = hf_adam(g.params.b, h, g.state.mu, g.state.nu, b1, b2, eps, step, rate * decay)
            results.append((Pair(jnp.zeros_like(g.params.a), b - g.params.b), LoraFAState(mu, nu)))
        return results

    def zeros(pair: Pair) -> LoraFAState:
        return LoraFAState(jnp.zeros_like(pair.b), jnp.zeros_like(pair.b))

    return of_pairs(others_by_adamw(pairwise(zeros, update, scale), learning_rate, **options))


def _stay(updates: Any, params: Any) -> Any:
    """Zeros, and NaN where a gradient is not finite: nobody wants it, but it tells that something is wrong."""
    del params
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), jnp.zeros_like(x), jnp.nan), updates)


def freeze_a(adapters: Any) -> Any:
    """The same adapters for the forward pass; no gradient flows to any ``lora_a``."""

    def frozen(pair: Mapping[str, Any]) -> Any:
        return {**pair, "lora_a": jax.lax.stop_gradient(pair["lora_a"])}

    return map_pairs(frozen, adapters, other=lambda leaf: leaf)
