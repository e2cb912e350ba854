"""The axis of objectives: what training minimises. One file each, one line here.

A member is a pure function of log-probabilities of completions, each the sum over a completion's tokens, and gives a
loss for each pair or each sequence. Where the lengths of completions count, they are arguments. The reference model of
``dpo`` and ``kto`` is the base: the adapted model without its adapters.

Imports: utils.
"""

from stablelora_jax.objectives.dpo import dpo
from stablelora_jax.objectives.kto import kto, kto_reference_point
from stablelora_jax.objectives.masked_target_kl import masked_target_kl
from stablelora_jax.objectives.orpo import orpo
from stablelora_jax.objectives.sft import sft
from stablelora_jax.objectives.simpo import simpo

__all__ = ["dpo", "kto", "kto_reference_point", "masked_target_kl", "orpo", "sft", "simpo"]
