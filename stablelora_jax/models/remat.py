"""Which intermediate values of a layer the forward pass saves for the backward pass, and which are recomputed.

Values carry names (``jax.ad_checkpoint.checkpoint_name``). LoRA computes no gradient of a frozen kernel, so recomputing
a whole layer adds half of a step's FLOPs, and only a third in full fine-tuning: hence several policies. Besides the
named values, the residual stream that enters each layer is always saved.

========== ================================================================== ===================================
policy     saved in each layer                                                recomputed
========== ================================================================== ===================================
everything all residuals of autodiff                                          nothing
save_dots  products of q, k, v, gate and up, probabilities or statistics and  norms, rotary embedding, silu,
           output of attention, the stream after it, ``x A`` of each pair     dropout: no matrix product
no_mlp     the same without gate and up                                       the products gate and up
attention  output and statistics of attention, ``x A`` of each pair           all products but attention's
nothing    nothing                                                            the layer
========== ================================================================== ===================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import flax.linen as nn
import jax

from stablelora_jax.models.attention_kernels.cudnn import saves_residuals
from stablelora_jax.utils.errors import InputError

Layer = TypeVar("Layer", bound=nn.Module)
Remat = Literal["everything", "save_dots", "no_mlp", "attention", "nothing"]
PAIR = ("lora_xa",)
ATTENTION = ("context", "lse")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "attention_probs", "residual")
KEPT: dict[str, tuple[str, ...]] = {
    "save_dots": (*PAIR, *ATTENTION, *PROJECTIONS, "gate_proj", "up_proj"),
    "no_mlp": (*PAIR, *ATTENTION, *PROJECTIONS),
    "attention": (*PAIR, *ATTENTION),
    "nothing": (),
}


def rematerialised(block: type[Layer], policy: str) -> type[Layer]:
    """The Linen class ``block`` with ``policy`` for its backward pass.

    Raises:
      InputError: an unknown policy.
    """
    if policy not in get_args(Remat):
        raise InputError(f"remat {policy!r} is none of {', '.join(get_args(Remat))}")
    if policy == "everything":
        return block
    return nn.remat(block, policy=saveable(policy), prevent_cse=False)  # a scan's body has no other copy for CSE


def saveable(policy: str) -> Callable[..., bool]:
    """The policy of ``jax.checkpoint`` that saves the values ``KEPT[policy]``."""
    saved: Callable[..., bool] = jax.checkpoint_policies.save_only_these_names(*KEPT[policy])
    if set(ATTENTION) <= set(KEPT[policy]):
        saved = jax.checkpoint_policies.save_from_both_policies(saved, saves_residuals)  # of cuDNN, without names
    return saved
