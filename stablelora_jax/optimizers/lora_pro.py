"""LoRA-Pro: factor steps whose sum is nearest to the full gradient (Wang et al., ICLR 2025, arXiv 2407.18242). ::

    hA = gA (B^T B)^-1 / s^2 + A X^T,    hB = (gB - PB gB) (A^T A)^-1 / s^2 - B X,    PB = B (B^T B)^-1 B^T

For every X (r, r), ``s hA B^T + s A hB^T = G - (I - PA) G (I - PB)``, the nearest that any factor step can come to the
gradient G of the kernel. X is free: ``"sylvester"``, the paper's, keeps hA, hB nearest to gA, gB and solves
``B^T B X + X A^T A = -(B^T B)^-1 gA^T A / s^2``; ``"symmetric"`` is ``-(B^T B)^-1 B^T gB (A^T A)^-1 / (2 s^2)``;
``"zero"``. Together with zero and symmetric X the step is the same for every factorisation to all orders.

``form="efficient"`` runs AdamW on hA, hB: the memory of AdamW. ``form="full"`` is the paper's AdamW: both moments of
the *equivalent gradient*, **2 in x out numbers for each adapted kernel**, as full fine-tuning has, O(in out r) time::

    E = s hA B^T + s A hB^T (X = 0),  U = AdamW's direction for E,  then hA, hB of gA = s U B, gB = s U^T A with X

``variant="code"`` counts one step ahead in the bias correction, as the released code does, so that its first step is
0.74 of Adam's; its bfloat16 second moments and its clipping by the raw gradient's norm are not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.optimizers.batched_pairs import Group, Pair, over, pairwise
from stablelora_jax.optimizers.checks import of_pairs
from stablelora_jax.optimizers.limits import require_numbers
from stablelora_jax.optimizers.linalg import eigh, gram, power, transpose
from stablelora_jax.optimizers.pair_tree import Scale, others_by_adamw
from stablelora_jax.utils.errors import InputError

PROJECTIONS = ("sylvester", "zero", "symmetric")


def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    damping: float = 1e-8,
    form: Literal["efficient", "full"] = "efficient",
    projection: Literal["sylvester", "zero", "symmetric"] = "sylvester",
    variant: Literal["paper", "code"] = "paper",
    scale: Scale = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro with AdamW; leaves outside pairs get AdamW.

    Args:
      learning_rate: scalar or schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule.
      damping: added to the Gram matrices before they are inverted.
      form: moments of the factors (efficient), or of the kernel's equivalent gradient (full).
      projection: the choice of X.
      variant: the paper's bias correction, or the code's; it matters for ``form="full"`` only.
      scale: the LoRA scale s: ``scales(adapters, spec)``; 1.0 only where alpha equals the rank.

    Raises:
      InputError: a number out of range, an unknown form, projection or variant, or a scale that is missing for a pair.
    """
    _require(form=(form, "efficient", "full"), variant=(variant, "paper", "code"))
    _require(projection=(projection, *PROJECTIONS))
    require_numbers(damping=damping, learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    options = dict(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if form == "efficient":
        return optax.chain(scale_by_lora_pro(projection, damping, scale), optax.adamw(learning_rate, **options))

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, Any]]:
        del extra
        k = count + (1 if variant == "paper" else 2)
        moments = [_moments(g, h, b1, b2) for g, h in zip(groups, _adjusted(groups, "zero", damping), strict=True)]
        directions = [over(mu / (1 - b1**k), jnp.sqrt(nu / (1 - b2**k)) + eps) for mu, nu in moments]
        seen = [g._replace(grads=_factor_gradients(u, g)) for g, u in zip(groups, directions, strict=True)]
        descents = _adjusted(seen, projection, damping)
        return list(zip(descents, moments, strict=True))

    full = optax.chain(
        pairwise(_zero_moments, update, scale),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return of_pairs(others_by_adamw(full, learning_rate, **options))


def scale_by_lora_pro(
    projection: Literal["sylvester", "zero", "symmetric"] = "sylvester", damping: float = 1e-8, scale: Scale = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Replace gA, gB by hA, hB; no state but a count; leaves outside pairs pass unchanged."""
    _require(projection=(projection, *PROJECTIONS))
    require_numbers(damping=damping)

    def update(groups: Sequence[Group], count: jax.Array, extra: Mapping[str, Any]) -> list[tuple[Pair, Any]]:
        del count, extra
        return [(h, None) for h in _adjusted(groups, projection, damping)]

    return of_pairs(pairwise(lambda pair: None, update, scale))


def _require(**options: tuple[str, ...]) -> None:
    for name, (given, *known) in options.items():
        if given not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, not {given!r}")


def _adjusted(groups: Sequence[Group], projection: str, damping: Any) -> list[Pair]:
    """hA, hB of each group."""
    grams = [gram(x) for g in groups for x in (g.params.a, g.params.b)]
    found = eigh(grams)
    return [_adjust(g, found[2 * i], found[2 * i + 1], projection, damping) for i, g in enumerate(groups)]


def _adjust(g: Group, of_a: Any, of_b: Any, projection: str, damping: Any) -> Pair:
    (a, b), (grad_a, grad_b) = g.params, g.grads
    square = g.scale[:, None, None] ** -2
    inverse_a, inverse_b = (power(values, vectors, -1.0, damping) for values, vectors in (of_a, of_b))
    first = square * grad_a @ inverse_b
    second = square * (grad_b - b @ (inverse_b @ (transpose(b) @ grad_b))) @ inverse_a
    if projection == "zero":
        return Pair(first, second)
    if projection == "symmetric":
        x = -0.5 * square * inverse_b @ (transpose(b) @ grad_b) @ inverse_a
    else:
        x = _sylvester(of_b, of_a, -transpose(first) @ a)
    return Pair(first + a @ transpose(x), second - b @ x)


def _sylvester(left: Any, right: Any, c: jax.Array) -> jax.Array:
    """X with ``L X + X R = c`` for symmetric L, R >= 0, given by their eigenvalues and eigenvectors."""
    (low, u), (high, v) = left, right
    total = jnp.maximum(low, 0)[..., :, None] + jnp.maximum(high, 0)[..., None, :]
    rotated = transpose(u) @ c @ v
    found: jax.Array = u @ jnp.where(total > 0, rotated / jnp.where(total > 0, total, 1), 0) @ transpose(v)
    return found


def _moments(g: Group, h: Pair, b1: Any, b2: Any) -> tuple[jax.Array, jax.Array]:
    """Moments of the equivalent gradient E, each (P, in, out)."""
    mu, nu = g.state
    s = g.scale[:, None, None]
    e = s * (h.a @ transpose(g.params.b) + g.params.a @ transpose(h.b))
    return b1 * mu + (1 - b1) * e, b2 * nu + (1 - b2) * e**2


def _factor_gradients(u: jax.Array, g: Group) -> Pair:
    s = g.scale[:, None, None]
    return Pair(s * u @ g.params.b, s * transpose(u) @ g.params.a)


def _zero_moments(pair: Pair) -> tuple[jax.Array, jax.Array]:
    shape = (*pair.a.shape[:-1], pair.b.shape[-2])
    return jnp.zeros(shape, pair.a.dtype), jnp.zeros(shape, pair.a.dtype)
