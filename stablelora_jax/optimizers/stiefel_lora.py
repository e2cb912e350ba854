"""Stiefel-LoRA: B keeps orthonormal columns (Findings of EMNLP 2025, arXiv 2508.17901). ::

    A <- AdamW(A, gA)
    M <- b1 M + (1 - b1) gB,   M' = M / (1 - b1^t)                the momentum of the Euclidean gradient
    xi = M' - B sym(B^T M')                                      its tangent part at B (out, r), B^T B = I
    B <- qf(B - eta_B xi)                                        the factor Q of the QR with a positive diagonal of R

The first update makes the pair fit without changing what it computes, whatever its gradient: ``B = Q R`` becomes Q and
A becomes ``A R^T``. After the usual start, B = 0, that is A = 0 and a Q made from A's own draw; it feeds no moments.
Orthonormal columns and decay exclude each other, so B has none. The paper does not say how M is carried from one
tangent space to the next; here it is not. qf is Gram-Schmidt, done twice, over all pairs at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, over, pairwise, settled, used, value
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.linalg import safe_scale, symmetric, transpose
from stablelora_jax.optimizers.pair_tree import others_by_adamw
from stablelora_jax.utils.errors import InputError


class StiefelState(NamedTuple):
    """State of a pair, tall."""

    mu: Pair  # first moments of A and B
    nu: jax.Array  # second moment of A (..., n, r)

    @property
    def moves_both(self) -> str:
        """Read by ``freeze``, which refuses to freeze one factor alone: the optimizer that moves both at once."""
        return "stiefel_lora"


def stiefel_lora(
    learning_rate: optax.ScalarOrSchedule,
    stiefel_learning_rate: optax.ScalarOrSchedule = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on A, momentum on the Stiefel manifold for B; leaves outside pairs get AdamW.

    Args:
      learning_rate: of A and of leaves outside pairs, scalar or schedule.
      stiefel_learning_rate: of B, scalar or schedule, in units of its gradient; the paper uses 0.1 and 0.3.
      b1: decay of the first moments.
      b2: decay of A's second moment.
      eps: added to the root of A's second moment.
      weight_decay: decoupled, of A, scalar or schedule.

    Raises:
      InputError: a number out of range; in ``init``, a pair with fewer outputs than its rank.
    """
    require_numbers(
        stiefel_learning_rate=stiefel_learning_rate,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        b1=b1,
        b2=b2,
        eps=eps,
    )

    def first_state(pair: Pair) -> StiefelState:
        m, r = pair.b.shape[-2:]
        if m < r:
            raise InputError(f"{m} outputs cannot have {r} orthonormal columns: lower the rank of this module")
        return StiefelState(jax.tree.map(jnp.zeros_like, pair), jnp.zeros_like(pair.a))

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, StiefelState]]:
        del extra
        rate, rate_b, decay = (value(x, count) for x in (learning_rate, stiefel_learning_rate, weight_decay))
        t = jnp.maximum(count, 1)  # the first update feeds no moments

        def move(g: Group) -> tuple[Pair, StiefelState]:
            (a, b), mu = g.params, jax.tree.map(lambda m, x: b1 * m + (1 - b1) * x, g.state.mu, g.grads)
            nu = b2 * g.state.nu + (1 - b2) * g.grads.a**2
            step = -rate * (over(mu.a / (1 - b1**t), jnp.sqrt(nu / (1 - b2**t)) + eps) + decay * a)
            momentum = mu.b / (1 - b1**t)
            tangent = momentum - b @ symmetric(transpose(b) @ momentum)
            moved = orthonormal_columns(b - rate_b * tangent, b)
            return Pair(step, moved - b), StiefelState(mu, nu)

        def begin(g: Group) -> tuple[Pair, StiefelState]:
            a, b = g.params
            rows = jnp.arange(b.shape[-2]) % a.shape[-2]
            random = jax.random.normal(jax.random.key(0), b.shape[-2:], b.dtype)[None] * used(g.params)[:, None, :]
            q = orthonormal_columns(b, a[..., rows, :], random)  # A has too few rows where in < r
            return Pair(a @ (transpose(b) @ q) - a, q - b), g.state

        def every(rule: Any) -> Any:
            return lambda given: settled([rule(g) for g in given], given)

        found: list[tuple[Pair, StiefelState]] = jax.lax.cond(count == 0, every(begin), every(move), list(groups))
        return found

    pairs = pairwise(first_state, update)
    return of_pairs(others_by_adamw(pairs, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))


def orthonormal_columns(x: jax.Array, *instead: jax.Array) -> jax.Array:
    """qf(x): the orthonormal Q (..., m, r) of ``x = Q R`` with a positive diagonal of R.

    A column of x that depends on those before it is replaced by that of the first of ``instead`` that does not; it is
    zero where all do.
    """
    smallest = jnp.finfo(x.dtype).eps * x.shape[-1]

    def across(q: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        v = v / safe_scale(v)  # its direction alone matters
        size = jnp.linalg.norm(v, axis=-2, keepdims=True)
        for _ in range(2):
            v = v - q @ (transpose(q) @ v)
        rest = jnp.linalg.norm(v, axis=-2, keepdims=True)
        return over(v, rest), rest > smallest * size

    def column(j: int, q: jax.Array) -> jax.Array:
        best = jnp.zeros_like(q[..., :1])
        for candidate in reversed((x, *instead)):
            own, found = across(q, jax.lax.dynamic_slice_in_dim(candidate, j, 1, -1))
            best = jnp.where(found, own, best)
        return jax.lax.dynamic_update_slice_in_dim(q, best, j, -1)

    found: jax.Array = jax.lax.fori_loop(0, x.shape[-1], column, jnp.zeros_like(x))
    return found
