"""Riemannian preconditioning: scaled GD and scaled AdamW (Zhang and Pilanci, ICML 2024, arXiv 2402.02347). ::

    hA = gA (B^T B + delta I)^-1,    hB = gB (A^T A + delta I)^-1          (A, B tall: see pairing)

Scaled GD steps along h and does not change when A B^T is factored differently (delta = 0). Scaled AdamW feeds h to
AdamW, which takes that invariance away. Neither uses the LoRA scale. In the paper both Gram matrices are the old ones.

The authors' AdamW differs: ``variant="gpt2"`` preconditions B by the *new* A (their code aliases it), adds eps before
the bias correction and decays after the step; ``variant="mistral"`` has no bias correction either. B = 0 makes the
first hA after it enormous, and with b2 = 0.999 Adam remembers it for a thousand steps while A stands nearly still: the
paper's GPT-2 runs use b1 = 0.7, b2 = 0.8. Their delta was picked by hand, from 1e-6 to 100; PEFT's is 1e-2.
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
from stablelora_jax.optimizers.pair_tree import others_by_adamw
from stablelora_jax.utils.errors import InputError


class HFAdamState(NamedTuple):
    """Moments of the preconditioned gradients of a pair, tall."""

    mu: Pair
    nu: Pair


def scale_by_riemannian(delta: Any = 1e-6) -> optax.GradientTransformationExtraArgs:
    """Multiply each factor's gradient by the inverse Gram matrix of the other; no state but a count.

    Put any optimizer after it (PEFT's ``create_riemannian_optimizer``). Leaves outside pairs pass unchanged.

    Args:
      delta: added to the diagonals of the Gram matrices; at 0, directions that are missing get no update.
    """
    require_numbers(delta=delta)

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, Any]]:
        del count, extra
        found = inverses([x for g in groups for x in (g.params.b, g.params.a)], delta)
        every = zip(groups, found[::2], found[1::2], strict=True)
        return [(Pair(times(g.grads.a, for_a), times(g.grads.b, for_b)), None) for g, for_a, for_b in every]

    return of_pairs(pairwise(lambda pair: None, update))


def scaled_gd(
    learning_rate: optax.ScalarOrSchedule, delta: Any = 1e-6, weight_decay: optax.ScalarOrSchedule = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Scaled gradient descent; leaves outside pairs get plain gradient descent at the same rate.

    Args:
      learning_rate: scalar or schedule.
      delta: added to the diagonals of the Gram matrices.
      weight_decay: decoupled, scalar or schedule.
    """
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay)
    return optax.chain(
        scale_by_riemannian(delta),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scaled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    delta: Any = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    variant: Literal["paper", "gpt2", "mistral"] = "paper",
) -> optax.GradientTransformationExtraArgs:
    """AdamW on the preconditioned gradients; leaves outside pairs get AdamW.

    Args:
      learning_rate: scalar or schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      delta: added to the diagonals of the Gram matrices.
      weight_decay: decoupled, scalar or schedule.
      variant: the paper's rule, or that of the authors' GPT-2 or Mistral code.
    """
    require_numbers(delta=delta, learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    options = dict(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if variant == "paper":
        return optax.chain(scale_by_riemannian(delta), optax.adamw(learning_rate, **options))
    if variant not in ("gpt2", "mistral"):
        raise InputError(f"variant must be paper, gpt2 or mistral, not {variant!r}")

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, Any]]:
        del extra
        t, rate, decay = count + 1, value(learning_rate, count), value(weight_decay, count)
        step = rate * (jnp.sqrt(1 - b2**t) / (1 - b1**t) if variant == "gpt2" else 1.0)

        def move(p: jax.Array, h: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return hf_adam(p, h, mu, nu, b1, b2, eps, step, rate * decay)

        by_b = inverses([g.params.b for g in groups], delta)
        new_a = [
            move(g.params.a, times(g.grads.a, inverse), g.state.mu.a, g.state.nu.a)
            for g, inverse in zip(groups, by_b, strict=True)
        ]
        by_a = inverses([a for a, _, _ in new_a], delta)
        new_b = [
            move(g.params.b, times(g.grads.b, inverse), g.state.mu.b, g.state.nu.b)
            for g, inverse in zip(groups, by_a, strict=True)
        ]
        return [
            (Pair(a - g.params.a, b - g.params.b), HFAdamState(Pair(mu_a, mu_b), Pair(nu_a, nu_b)))
            for g, (a, mu_a, nu_a), (b, mu_b, nu_b) in zip(groups, new_a, new_b, strict=True)
        ]

    def zeros(pair: Pair) -> HFAdamState:
        return HFAdamState(jax.tree.map(jnp.zeros_like, pair), jax.tree.map(jnp.zeros_like, pair))

    return of_pairs(others_by_adamw(pairwise(zeros, update), learning_rate, **options))


riemannian = scaled_adamw  # the name under which comparisons know it
