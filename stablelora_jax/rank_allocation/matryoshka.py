"""MatryoshkaLoRA: one pair trained as the sum of the nested pairs of several ranks (Modoranu et al., arXiv 2605.07850).

Over the ranks q in S, with s_q the scale at rank q::

    training        y = x W0 + sum_q s_q x A[:, :q] B[:q] = x W0 + x A P B,   P = diag(sum of s_q over q >= i)
    afterwards      y = x W0 + s_k x A[:, :k] B[:k]                           for any k, :func:`.truncate`

The paper's S are the powers of two up to R and its s_q = 1 / sqrt(q), without alpha: ``scaling: rslora, alpha: 1``. A
model in training is a sum over ranks and afterwards one of them, by design. The released code (``IST-DASLab/
MatryoshkaLoRA``) divides the sum by the size of S where it computes it term by term (``binary``), and not where it uses
P (``diag``), which is the paper's Algorithm 1 and what is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.rank_allocation.allocation import Allocation
from stablelora_jax.rank_allocation.nested import largest_rank, require_nested, scale_ratios, weighted
from stablelora_jax.utils.errors import InputError


def matryoshka(spec: LoraSpec, steps: int, ranks: tuple[int, ...] | None = None) -> Allocation:
    """Train one pair as the sum of the nested pairs of several ranks (MatryoshkaLoRA).

    Args:
      spec: of the adapters.
      steps: of the training.
      ranks: the nested ranks, rising; null for the powers of two below the rank, and the rank.

    Raises:
      InputError: ranks that do not rise or exceed the spec's; a parametrisation whose ranks are not independent.

    Example::

      >>> seen = matryoshka(LoraSpec(rank=2, target_modules=["q_proj"]), steps=10).seen
      >>> pair = {"q_proj": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}}
      >>> seen(pair, None)["q_proj"]["lora_a"][0]  # in the loss: P / s_R, for 16 / 1 + 16 / 2 and 16 / 2
      Array([3., 1.], dtype=float32)
    """
    require_nested("matryoshka", spec)
    ranks = nested_ranks(largest_rank(spec)) if ranks is None else tuple(ranks)
    rises = all(low < high for low, high in zip(ranks, ranks[1:], strict=False))
    if not ranks or not rises or ranks[0] < 1 or ranks[-1] > largest_rank(spec):
        raise InputError(f"ranks must rise from at least 1 to at most {largest_rank(spec)}, the rank, not {ranks}")
    return Allocation(seen=lambda adapters, _: nested_sum(adapters, spec, ranks))


def nested_ranks(rank: int) -> tuple[int, ...]:
    """The powers of two below ``rank``, and ``rank``."""
    return (*(2**i for i in range(max(0, math.ceil(math.log2(rank))))), rank)


def nested_sum(adapters: Any, spec: LoraSpec, ranks: Sequence[int]) -> Any:
    """``adapters``, of unchanged shapes and scale, whose change is the sum of those truncated at each of ``ranks``."""
    targets = adapter_target_modules(adapters, spec)
    return weighted(adapters, spec, {path: jnp.asarray(_diagonal(t, spec, ranks)) for path, t in targets.items()})


def _diagonal(target: TargetModule, spec: LoraSpec, ranks: Sequence[int]) -> np.ndarray:
    """``P / s_R`` of each element of the stack, (*stack, rank)."""
    ratios = scale_ratios(target, spec, ranks)[..., None]  # (ranks, *stack, 1)
    within = np.arange(target.rank) < np.array(ranks)[:, None]
    found: np.ndarray = (ratios * within.reshape(len(ranks), *(1,) * len(target.stack), -1)).sum(axis=0)
    return found


def aurac(values: Sequence[float], ranks: Sequence[int]) -> float:
    """The area under the curve of a value, such as an accuracy, over log2 of the rank, divided by its range (AURAC).

    Args:
      values: one for each rank.
      ranks: rising.

    Raises:
      InputError: no value, another number of ranks, or ranks that do not rise.

    Example::

      >>> aurac([0.2, 0.4, 0.6], [1, 2, 4])
      0.4
    """
    if not values or len(values) != len(ranks) or list(ranks) != sorted(set(ranks)) or ranks[0] < 1:
        raise InputError(f"aurac needs a value for each of rising ranks, not {len(values)} values for {list(ranks)}")
    if len(values) == 1:
        return float(values[0])
    places = [math.log2(rank) for rank in ranks]
    area = sum((b - a) * (v + w) / 2 for a, b, v, w in zip(places, places[1:], values, values[1:], strict=False))
    return float(area / (places[-1] - places[0]))
