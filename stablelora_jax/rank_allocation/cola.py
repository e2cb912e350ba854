"""Chain of LoRA: K pairs are trained one after another, each kept when the next begins (Xia et al., arXiv 2401.04151).

After each K-th part of the steps a knot is tied: the pair is added to what the adapter changes for good, A and B are
drawn anew, and the optimizer begins anew. So the change is a sum of K products of rank r::

    dW = s (A B + A_1 B_1 + ... + A_k B_k)

The paper adds a tied pair to the base. Here the base does not move: tied pairs stay in the adapter as what is
subtracted from it, ``frozen_a`` = [A_1, ..., A_{K-1}] and ``frozen_b`` = -[B_1; ...; B_{K-1}], zero until their knot.
The function is the same at a knot, up to rounding, without the rounding of repeated merges into a narrow base; its
price is that of a pair of rank K r. The optimizer's state is reset, its learning-rate schedule goes on. K = 1 is LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.fitting import fitting_targets
from stablelora_jax.lora.leaves import FACTORS, adapter_target_modules, start_leaves
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import as_dict
from stablelora_jax.lora.zero_ranks import without_zero_ranks
from stablelora_jax.rank_allocation.allocation import Allocation, Restart, require_parametrization
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError

DRAWN = ("kaiming", "gaussian", "init_b", "orthogonal")  # from a key and shapes alone, with A B = 0
SLOTS = {"lora_a": ("frozen_a", -1), "lora_b": ("frozen_b", -2)}  # where a tied factor goes, and its axis of ranks


def cola(spec: LoraSpec, steps: int, length: int = 2) -> Allocation:
    """Train several pairs one after another, each kept when the next begins (COLA, chain of LoRA).

    Args:
      spec: of the adapters; parametrization lora or dora, and an init whose product is zero.
      steps: of the training.
      length: pairs of the chain, each trained for its part of the steps; 1 is LoRA.

    Raises:
      InputError: a length that the steps do not have, a parametrisation without a plain pair, or an init that reads the
        kernel or changes the function.

    Example::

      >>> own = cola(LoraSpec(target_modules=["q_proj"]), steps=90, length=3)
      >>> list(own.restarts)  # before these steps
      [30, 60]
    """
    require_parametrization("cola", spec, ("lora", "dora"), "keeps tied pairs beside the pair")
    if spec.init not in DRAWN:
        raise InputError(
            f"cola draws pairs anew from a key alone, with A B = 0, which init {spec.init!r} does not: "
            f"say init: {', '.join(DRAWN)}"
        )
    if not 1 <= length <= steps:
        raise InputError(f"length must be in [1, {steps}], the steps, not {length}")
    if length == 1:
        return Allocation()

    def knot(number: int) -> Restart:
        return lambda adapters, key, params: tie_knot(adapters, spec, number, key, params=params)

    return Allocation(
        start=lambda adapters: with_slots(adapters, spec, length - 1),
        restarts={steps * i // length: knot(i - 1) for i in range(1, length)},
        finished=without_zero_ranks,
    )


def with_slots(adapters: Mapping[str, Any], spec: LoraSpec, count: int) -> dict[str, Any]:
    """``adapters`` with room for ``count`` tied pairs beside each pair: zeros, which change nothing."""
    for path in adapter_target_modules(adapters, spec):
        node = tree.get_in(adapters, path)
        slots = {
            slot: jnp.concatenate([jnp.zeros_like(node[name])] * count, axis=axis)
            for name, (slot, axis) in SLOTS.items()
        }
        adapters = tree.set_in(adapters, path, {**node, **slots})
    return dict(adapters)


@checked
def tie_knot(
    adapters: Mapping[str, Any], spec: LoraSpec, number: int, key: jax.Array, *, params: Any = None
) -> dict[str, Any]:
    """``adapters`` with each pair moved to slot ``number``, and the pair drawn anew; the function is the same.

    Reset the optimizer's state with it (:func:`.restart`).

    Args:
      adapters: as :func:`with_slots` has made them.
      spec: of the adapters.
      number: of the knot, from 0.
      key: a PRNG key, of which the new pairs are drawn.
      params: of the base; only shapes are read. Required where an embedding is adapted.

    Raises:
      InputError: adapters that do not fit, or without such a slot.
    """
    targets = (
        adapter_target_modules(adapters, spec) if params is None else fitting_targets(adapters, spec, as_dict(params))
    )
    plain = replace(spec, parametrization="lora", lora_bias=False)
    for path, target in targets.items():
        node, kept = tree.get_in(adapters, path), {}
        for name, (slot, axis) in SLOTS.items():
            begin = number * target.rank
            if slot not in node or not 0 <= begin < node[slot].shape[axis]:
                raise InputError(f"{'.'.join(path)} has no slot {number} for a tied pair: make them with with_slots")
            tied = node[name] if name == "lora_a" else -node[name]
            kept[slot] = jax.lax.dynamic_update_slice_in_dim(node[slot], tied, begin, axis=node[slot].ndim + axis)
        new = start_leaves(key, None, target, plain, node["lora_a"].dtype)
        adapters = tree.set_in(adapters, path, {**node, **kept, **{name: new[name] for name in FACTORS}})
    return dict(adapters)
