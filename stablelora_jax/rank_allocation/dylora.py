"""DyLoRA: each step trains the first k ranks, k drawn uniformly from 1 to R (Valipour et al., arXiv 2210.07558).

One k for all modules::

    y = x W0 + s_k x A[:, :k] B[:k]        s_k the scale at rank k: alpha / k for scaling: lora

so that :func:`.truncate` gives a trained adapter of every rank. With ``frozen``, as in the authors' training script
(``huawei-noah/Efficient-NLP:DyLoRA``, ``run_glue.py``), gradients reach rank k alone, of column k of A and row k of B;
without it, all of the first k. Ranks that are not in use get gradients that are exactly zero; what the optimizer does
with a zero gradient (momentum, weight decay), it does here as it does there.

The rank is drawn from the key of the step, the same on all devices and for all micro-batches. The code's embeddings,
whose scale is not that of the drawn rank, and its clamp, which lets a module of a smaller rank have a scale of one rank
too many, are not followed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.rank_allocation.allocation import Allocation
from stablelora_jax.rank_allocation.nested import RANK_AXES, largest_rank, require_nested, scale_ratios, weighted
from stablelora_jax.utils import tree

DRAW = 2**32 - 1  # folded into the key of a step, whose rows fold in their numbers


def dylora(spec: LoraSpec, steps: int, frozen: bool = True) -> Allocation:
    """Train the first k ranks in each step, k drawn uniformly (DyLoRA); truncate at any rank after training.

    Args:
      spec: of the adapters.
      steps: of the training.
      frozen: gradients reach rank k alone, not those below it.

    Raises:
      InputError: a parametrisation whose ranks are not independent.

    Example::

      >>> seen = dylora(LoraSpec(rank=4, target_modules=["q_proj"]), steps=10).seen
      >>> pair = {"q_proj": {"lora_a": jnp.ones((6, 4)), "lora_b": jnp.ones((4, 6))}}
      >>> used = (seen(pair, jax.random.key(0))["q_proj"]["lora_a"] != 0).sum(1)  # in the loss, by the step's key
      >>> bool((used == used[0]).all())
      True
    """
    require_nested("dylora", spec)
    return Allocation(seen=lambda adapters, key: first_ranks(adapters, spec, drawn_rank(key, spec), frozen))


def drawn_rank(key: jax.Array, spec: LoraSpec) -> jax.Array:
    """The rank of a step, an int32 scalar in [1, R], from the step's key."""
    key = jax.random.fold_in(key, jnp.uint32(DRAW))
    return jax.random.randint(key, (), 1, largest_rank(spec) + 1, jnp.int32)


def first_ranks(adapters: Any, spec: LoraSpec, rank: ArrayLike, frozen: bool = False) -> Any:
    """``adapters``, of unchanged shapes and scale, that compute what those of the first ``rank`` ranks do.

    Args:
      adapters: of ``spec``, frozen leaves included.
      spec: of the adapters.
      rank: at least 1, may be traced.
      frozen: gradients reach the last of these ranks alone.
    """
    targets, ranks = adapter_target_modules(adapters, spec), range(1, largest_rank(spec) + 1)
    weights = {}
    for path, target in targets.items():
        used = jnp.minimum(rank, jnp.array(target.ranks).reshape(target.stack))[..., None]  # (*stack, 1)
        places = jnp.arange(target.rank).reshape((1,) * len(target.stack) + (-1,))
        ratio = jnp.asarray(scale_ratios(target, spec, ranks))[jnp.asarray(rank) - 1][..., None]
        weights[path] = jnp.where(places < used, ratio, 0)
        if frozen:
            adapters = tree.set_in(adapters, path, _held(tree.get_in(adapters, path), places == used - 1))
    return weighted(adapters, spec, weights)


def _held(node: Any, trained: jax.Array) -> dict[str, jax.Array]:
    """The leaves of an adapter, through which gradients flow where ``trained`` (*stack, rank)."""

    def held(name: str, leaf: jax.Array) -> jax.Array:
        if name not in RANK_AXES:
            return leaf
        one = trained if leaf.ndim == trained.ndim else jnp.expand_dims(trained, -3 - RANK_AXES[name])  # of -1 and -2
        return jnp.where(one, leaf, jax.lax.stop_gradient(leaf))

    return {name: held(name, leaf) for name, leaf in node.items()}
