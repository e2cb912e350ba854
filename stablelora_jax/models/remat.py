"""Which intermediate values of a layer the backward pass finds again, and which it computes anew.

Values carry names (``jax.ad_checkpoint.checkpoint_name``). LoRA has no gradient of a frozen kernel to pay for, so
computing a whole layer anew costs it half as much again, and full fine-tuning only a third: hence policies in steps.
Beside what is named, the residual stream that enters each layer is always kept.

========== ================================================================== ===================================
policy     kept in each layer                                                 computed anew
========== ================================================================== ===================================
everything whatever autodiff asks for                                         nothing
save_dots  products of q, k, v, gate and up, probabilities or statistics and  norms, rotary positions, silu,
           output of attention, the stream after it, ``x A`` of each pair     dropout: no matrix product
no_mlp     the same without gate and up                                       the products gate and up
attention  output and statistics of attention, ``x A`` of each pair           all products but attention's
nothing    nothing                                                            the layer
========== ================================================================== ===================================
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import flax.linen as nn
import jax

from stablelora_jax.utils.errors import InputError

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


def rematerialised(block: Any, policy: str) -> Any:
    """The Linen class ``block``, whose backward pass keeps what ``policy`` says.

    Raises:
      InputError: an unknown policy.
    """
    if policy not in get_args(Remat):
        raise InputError(f"remat {policy!r} is none of {', '.join(get_args(Remat))}")
    if policy == "everything":
        return block
    kept = jax.checkpoint_policies.save_only_these_names(*KEPT[policy])
    return nn.remat(block, policy=kept, prevent_cse=False)  # inside a scan there is nothing to be joined by CSE
