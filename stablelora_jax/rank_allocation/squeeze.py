"""LoRA-Squeeze during training: the rank falls in steps, each to the best pair of the lower rank (arXiv 2602.10993).

A squeeze to rank k replaces A B by its k largest singular values, shared evenly between the factors, computed without
the product (QR of both factors, a decomposition of r x r), and the optimizer begins anew; its schedule goes on. One
squeeze is the paper's Cont-Squeeze, several are its In-Squeeze; after training it is ``to_lora(rank=)``. The error of a
squeeze is the root of the sum of the squared singular values that it drops (Eckart and Young).

Shapes and scale stay those of the first rank: what is not in use is zero in both factors, which every gradient keeps at
zero, and the adapter that is saved has the last rank. So one program trains all ranks, and a checkpoint of any step
fits the run. Two choices are of this library: the ranks fall geometrically, in equal parts of the steps, and a rank
without a singular value keeps its column of A beside a row of zeros in B, so that it can be trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from stablelora_jax.lora.leaves import adapter_target_modules, subtracts_start
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.to_lora import best_pair
from stablelora_jax.lora.zero_ranks import without_zero_ranks
from stablelora_jax.rank_allocation.allocation import Allocation, Restart, require_parametrization
from stablelora_jax.rank_allocation.nested import largest_rank
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError


def squeeze(spec: LoraSpec, steps: int, target_rank: int | None = None, squeezes: int | None = None) -> Allocation:
    """Lower the rank in the course of training, each time to the best pair of that rank (LoRA-Squeeze).

    Args:
      spec: of the adapters; parametrization lora, without a start that stays subtracted.
      steps: of the training.
      target_rank: the last rank; null for half of the rank.
      squeezes: how often the rank falls; null for as often as it can be halved.

    Raises:
      InputError: another parametrisation or start, a rank that is not below the spec's, or more squeezes than steps or
        ranks.

    Example::

      >>> own = squeeze(LoraSpec(rank=64, target_modules=["q_proj"]), steps=400, target_rank=8)
      >>> list(own.restarts)  # before these steps, to ranks 32, 16 and 8
      [100, 200, 300]
    """
    require_parametrization("squeeze", spec, ("lora",), "cuts a plain pair to its largest singular values")
    if subtracts_start(spec):
        raise InputError(f"squeeze cuts A B, from which init {spec.init!r} subtracts its start: say init: kaiming")
    first = largest_rank(spec)
    last = max(1, first // 2) if target_rank is None else target_rank
    if not 1 <= last < first:
        raise InputError(f"target_rank must be in [1, {first}), below the rank of the spec, not {last}")
    count = math.ceil(math.log2(first / last)) if squeezes is None else squeezes
    ranks = [round(first * (last / first) ** (i / count)) for i in range(1, count + 1)] if count > 0 else []
    if not 1 <= count < steps or len({first, *ranks}) <= count:
        raise InputError(f"squeezes: from rank {first} to {last} in {steps} steps it cannot fall {count} times")

    def to(rank: int) -> Restart:
        return lambda adapters, key, params: squeezed(adapters, spec, rank)

    return Allocation(
        restarts={steps * i // (count + 1): to(rank) for i, rank in enumerate(ranks, 1)}, finished=without_zero_ranks
    )


@checked
def squeezed(adapters: Mapping[str, Any], spec: LoraSpec, rank: int) -> dict[str, Any]:
    """``adapters`` of the same shapes with each pair the best one of at most ``rank``, zero beyond it.

    Reset the optimizer's state with it (:func:`.restart`). For smaller shapes, call ``to_lora(rank=)``.

    Raises:
      InputError: adapters that do not fit the spec, or a rank below 1.
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1, not {rank}")
    for path, target in adapter_target_modules(adapters, spec).items():
        node, most = tree.get_in(adapters, path), min(rank, target.rank)
        cut, used = best_pair(node, most), jnp.asarray(target.mask()[..., :most])
        a, b, beyond = cut["lora_a"], cut["lora_b"], (0, target.rank - most)
        a = jnp.where((a == 0).all(axis=-2, keepdims=True), node["lora_a"][..., :most], a)
        a, b = jnp.where(used[..., None, :], a, 0), jnp.where(used[..., :, None], b, 0)
        around = [(0, 0)] * (a.ndim - 2)
        cut["lora_a"], cut["lora_b"] = jnp.pad(a, [*around, (0, 0), beyond]), jnp.pad(b, [*around, beyond, (0, 0)])
        adapters = tree.set_in(adapters, path, cut)
    return dict(adapters)
