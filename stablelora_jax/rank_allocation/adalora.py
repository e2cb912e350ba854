"""AdaLoRA: the budget of ranks falls, and the triplets of least importance are masked (Zhang et al., arXiv 2303.10512).

For the parametrisation ``adalora``, ``dW = s A diag(e) B``. After each update, with w a trained number and g its
gradient, t the number of updates so far and T the steps of the training (section 3.2)::

    I = |w g|;  I' <- beta1 I' + (1 - beta1) I;  U <- beta2 U + (1 - beta2) |I - I'|      while t < T - tfinal
    score of triplet i = I' U of e_i  +  the mean of I' U over column i of A  +  the mean over row i of B
    b(t) = b0 up to tinit, then bT + (b0 - bT) (1 - (t - tinit) / (T - tinit - tfinal))^3, then bT
    e <- 0 outside the b(t) triplets of highest score, over all modules and layers, if t is a multiple of delta_t,
         and at every step from T - tfinal on, where scores no longer change

A masked e may be trained away from zero until the last phase, as in the authors' code
(``QingruZhang/AdaLoRA:loralib/loralib/adalora.py``). The loss gets ``orth_reg_weight`` times the mean over all factors
of ``||A^T A - I||_F`` and ``||B B^T - I||_F``.

Differences from the authors' code and PEFT's (``peft/tuners/adalora``): among equal scores the first ones are kept, so
that the budget is met exactly (both mask whatever is not above the threshold). Here t counts from 1. At T - tfinal the
mask is always applied, as in PEFT, whatever delta_t. Their scale is ``alpha / (r + 1e-5)`` and their A and B begin as
N(0, 0.02^2); here the scale is the spec's and the start that of ``init``. PEFT adds the penalty to the loss that it
reports; here the reported loss is that of the data. Layers that are not adapted have no share in the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.zero_ranks import without_zero_ranks
from stablelora_jax.rank_allocation.allocation import Allocation, require_parametrization
from stablelora_jax.rank_allocation.budget import budget_schedule, largest
from stablelora_jax.rank_allocation.nested import smallest_rank
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

TRIPLET = ("lora_a", "lora_b", "lora_e")
WHY = "masks the singular values e of A diag(e) B"


class MaskToBudgetState(NamedTuple):
    """State of :func:`mask_to_budget`."""

    count: jax.Array  # type: ignore[assignment]  # updates so far, int32
    sensitivity: Any  # the mean I' of |w g|, of the leaves of each triplet, at their paths
    uncertainty: Any  # the mean U of |I - I'|, likewise
    inner: optax.OptState


def adalora(
    spec: LoraSpec,
    steps: int,
    target_rank: int = 8,
    tinit: int = 0,
    tfinal: int = 0,
    delta_t: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth_reg_weight: float = 0.5,
) -> Allocation:
    """Mask the least important of the trained singular values until a budget is met (AdaLoRA); names are PEFT's.

    Args:
      spec: of the adapters; parametrization adalora.
      steps: of the training.
      target_rank: mean rank of a module at the end, below the rank that it begins with.
      tinit: first steps at the full rank.
      tfinal: last steps, in which the masked ranks no longer change.
      delta_t: steps between two masks.
      beta1: decay of the mean of the importance.
      beta2: decay of the mean of its uncertainty.
      orth_reg_weight: of the penalty that keeps A and B orthogonal; 0 for none.

    Raises:
      InputError: another parametrisation, or a number out of range.

    Example::

      >>> spec = LoraSpec(rank=12, target_modules=["q_proj"], parametrization="adalora", init="init_ab")
      >>> own = adalora(spec, steps=100)
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), own.around(optax.adamw(1e-3)))
      >>> loss = lambda adapters: data_loss(adapters) + own.penalty(adapters)
    """
    require_parametrization("adalora", spec, ("adalora",), WHY)

    def around(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return mask_to_budget(tx, spec, steps, target_rank, tinit, tfinal, delta_t, beta1, beta2)

    around(optax.identity())  # refuses what cannot be
    if orth_reg_weight < 0:
        raise InputError(f"orth_reg_weight must not be negative, not {orth_reg_weight}")
    penalty = None if orth_reg_weight == 0 else lambda own: orth_reg_weight * orthogonality(own, spec)
    return Allocation(around=around, penalty=penalty, finished=without_zero_ranks)


def mask_to_budget(
    inner: optax.GradientTransformation,
    spec: LoraSpec,
    steps: int,
    target_rank: int,
    tinit: int = 0,
    tfinal: int = 0,
    delta_t: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Wrap ``inner`` so that after each update all but the budget's triplets have e = 0; arguments as :func:`adalora`.

    Place it after gradient clipping: importances are of the clipped gradients, as in the authors' code.

    Raises:
      InputError: a number out of range.
    """
    if not 0 < target_rank < smallest_rank(spec):
        raise InputError(f"target_rank {target_rank} must be in [1, {smallest_rank(spec)}), below the rank of the spec")
    if min(tinit, tfinal) < 0 or tinit + tfinal >= steps:
        raise InputError(f"tinit {tinit} and tfinal {tfinal} leave none of the {steps} steps to lower the budget in")
    if delta_t < 1 or not 0 < beta1 < 1 or not 0 < beta2 < 1:
        raise InputError(f"delta_t must be at least 1, beta1 and beta2 in (0, 1), not {delta_t}, {beta1}, {beta2}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> MaskToBudgetState:
        zeros = {path: jax.tree.map(jnp.zeros_like, own) for path, own in _triplets(params, spec).items()}
        return MaskToBudgetState(jnp.zeros((), jnp.int32), _nested(zeros), _nested(zeros), inner.init(params))

    def update(
        updates: Any, state: MaskToBudgetState, params: Any = None, **extra: Any
    ) -> tuple[Any, MaskToBudgetState]:
        grads, count = updates, optax.safe_increment(state.count)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        after, learns = optax.apply_updates(params, updates), count < steps - tfinal
        means = _importance(after, grads, state, spec, learns, beta1, beta2)
        targets = adapter_target_modules(params, spec)
        used = sum(sum(rank > 0 for rank in target.ranks) for target in targets.values())
        first = sum(sum(target.ranks) for target in targets.values())
        budget = budget_schedule(first, target_rank * used, steps, tinit, tfinal)(count)
        kept = largest(_scores(*means), {path: target.mask() for path, target in targets.items()}, budget)
        due = (count > tinit) & ((count % delta_t == 0) | (count >= steps - tfinal))
        for path, keep in kept.items():
            e, step = (tree.get_in(t, (*path, "lora_e")) for t in (params, updates))
            updates = tree.set_in(updates, (*path, "lora_e"), jnp.where(due & ~keep, -e, step))  # e - e is 0, exactly
        return updates, MaskToBudgetState(count, _nested(means[0]), _nested(means[1]), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonality(adapters: Any, spec: LoraSpec) -> jax.Array:
    """The mean over all A and B of ``||A^T A - I||_F`` and ``||B B^T - I||_F``, a scalar; 0 if they are orthonormal."""
    total, count = jnp.zeros(()), 0
    for path, target in adapter_target_modules(adapters, spec).items():
        pair, used = tree.get_in(adapters, path), np.array(target.ranks).reshape(target.stack) > 0
        for factor in (pair["lora_a"].swapaxes(-1, -2), pair["lora_b"]):  # (*stack, r, size)
            gram = jnp.matmul(factor, factor.swapaxes(-1, -2))
            identity = jnp.eye(target.rank, dtype=gram.dtype).reshape((1,) * len(target.stack) + gram.shape[-2:])
            squares = ((gram - identity) ** 2).sum((-1, -2))
            norms = jnp.sqrt(jnp.where(squares == 0, 1, squares))  # whose gradient at 0 would be infinite
            total += jnp.where(used & (squares != 0), norms, 0).sum()
            count += int(used.sum())
    return total / count


def _importance(
    params: Any, grads: Any, state: MaskToBudgetState, spec: LoraSpec, learns: jax.Array, beta1: float, beta2: float
) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """I' and U after an update that has led to ``params``; as they were where not ``learns``."""

    def mean(w: jax.Array, g: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(learns, beta1 * old + (1 - beta1) * jnp.abs(w * g), old)

    def spread(w: jax.Array, g: jax.Array, mean: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(learns, beta2 * old + (1 - beta2) * jnp.abs(jnp.abs(w * g) - mean), old)

    found: tuple[dict[Path, Any], dict[Path, Any]] = ({}, {})
    for path, own in _triplets(params, spec).items():
        g, *old = ({name: tree.get_in(t, path)[name] for name in TRIPLET} for t in (grads, *state[1:3]))
        found[0][path] = jax.tree.map(mean, own, g, old[0])
        found[1][path] = jax.tree.map(spread, own, g, found[0][path], old[1])
    return found


def _scores(sensitivity: Mapping[Path, Any], uncertainty: Mapping[Path, Any]) -> dict[Path, jax.Array]:
    """The score of each triplet, (*stack, rank)."""
    found = {}
    for path, mean in sensitivity.items():
        a, b, e = (mean[name] * uncertainty[path][name] for name in TRIPLET)
        found[path] = e + a.mean(-2) + b.mean(-1)
    return found


def _triplets(adapters: Any, spec: LoraSpec) -> dict[Path, dict[str, jax.Array]]:
    """The leaves A, B, e of each adapted module, by path."""
    found = {path: tree.get_in(adapters, path) for path in adapter_target_modules(adapters, spec)}
    return {path: {name: node[name] for name in TRIPLET} for path, node in found.items()}


def _nested(found: Mapping[Path, Any]) -> Any:
    whole: dict[str, Any] = {}
    for path, node in found.items():
        whole = tree.set_in(whole, path, node)
    return whole
