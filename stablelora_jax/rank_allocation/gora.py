"""GoRA's ranks: a module's share of a budget follows its sensitivity to the loss (He et al., arXiv 2502.12171).

With G the mean gradient of some batches with respect to a kernel W (m, n), and r the rank of the spec::

    I = mean |W * G|                                   the importance of a module
    share = I / sum of I
    r_i = round(share_i * sum_j r sqrt(m_j + n_j)) // sqrt(m_i + n_i), within [min_rank, max_rank]

as the released code computes it (``hhnqqq/MyTransformers:common/lora_modules/gora.py``, ``union_mean``, ``sqrt``,
``moderate``), which rounds before it divides: equal importances may give one rank less than r. The scale of every
module stays that of the rank r, as there. This is the rule for ranks alone: the paper's start of B from the gradient is
not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec, items
from stablelora_jax.lora.target_modules import as_dict, find_target_modules, target_matrix
from stablelora_jax.rank_allocation.eva import with_ranks
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError


@checked
def gora_spec(params: Any, grads: Any, spec: LoraSpec, min_rank: int = 1, max_rank: int | None = None) -> LoraSpec:
    """``spec`` with a rank for each module by the gradients of the kernels, at the budget of the rank of ``spec``.

    Args:
      params: of the base.
      grads: a tree like ``params`` with the mean gradients at adapted kernels; whatever else it holds is not read. Or
        what :func:`.calibrate` gives for the spec with ``init="lora_ga"``.
      spec: its rank is the mean; no ``rank_pattern`` and no ``alpha_pattern``.
      min_rank: smallest rank.
      max_rank: largest rank; None for no limit.

    Raises:
      InputError: limits that do not hold the spec's rank, patterns in the spec, gradients that are all zero, or modules
        that patterns cannot tell apart, such as experts, with different ranks.

    Example::

      >>> import jax.numpy as jnp
      >>> params = {"q": {"kernel": jnp.ones((8, 8))}, "v": {"kernel": jnp.ones((8, 8))}}
      >>> grads = {"q": {"kernel": jnp.full((8, 8), 3.0)}, "v": {"kernel": jnp.ones((8, 8))}}
      >>> ranks = gora_spec(params, grads, LoraSpec(rank=4, target_modules=["q", "v"]))
      >>> ranks.rank_of("q"), ranks.rank_of("v"), ranks.scale_of("q")
      (6, 2, 4.0)
    """
    if not 1 <= min_rank <= spec.rank <= (max_rank or spec.rank):
        raise InputError(f"min_rank {min_rank} and max_rank {max_rank} must hold {spec.rank}, the rank of the spec")
    if spec.rank_pattern or spec.alpha_pattern:
        raise InputError("gora_spec finds the ranks: leave rank_pattern and alpha_pattern out of the spec")
    targets = find_target_modules(as_dict(params), spec)
    importances, widths = {}, {}
    for target in targets.values():
        values = _importances(as_dict(params), as_dict(grads), target)
        for name, value, rank in zip(target.names, values, target.ranks, strict=True):
            if rank:
                importances[name], widths[name] = value, math.sqrt(sum(target.size))
    found = with_ranks(spec, allocated_ranks(importances, widths, spec.rank, min_rank, max_rank))
    scales = {rank: replace(spec, rank=rank).scale_of("") for _, rank in items(found.rank_pattern)}
    ratios = {pattern: spec.scale_of("") / scales[rank] for pattern, rank in items(found.rank_pattern)}
    return replace(found, alpha_pattern={pattern: spec.alpha * ratio for pattern, ratio in ratios.items()})


def allocated_ranks(
    importances: Mapping[str, float], widths: Mapping[str, float], rank: int, min_rank: int, max_rank: int | None
) -> dict[str, int]:
    """The rank of each module by name, from its importance and its ``sqrt(m + n)``.

    Raises:
      InputError: no importance is above zero, or one is not finite.
    """
    total = sum(importances.values())
    if not (math.isfinite(total) and total > 0):
        raise InputError(f"the importances sum to {total}: pass gradients that are finite and not all zero")
    budget = sum(rank * width for width in widths.values())
    found = {name: int(round(budget * own / total) // widths[name]) for name, own in importances.items()}
    return {name: min(max(own, min_rank), max_rank or own + min_rank) for name, own in found.items()}


def _importances(params: Any, grads: Any, target: TargetModule) -> list[float]:
    """``mean |W * G|`` of each element of the stack."""
    calibrated = tree.get_in(grads, (*target.path, "gradient"))
    gradient = target_matrix(grads, target) if calibrated is None else calibrated
    w, g = (np.asarray(x, np.float64) for x in (target_matrix(params, target), gradient))
    return [float(value) for value in np.abs(w * g).mean((-2, -1)).ravel()]
