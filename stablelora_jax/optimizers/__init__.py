"""The axis of optimisation dynamics: ``optax.GradientTransformation``s over trees that contain pairs. One file each.

Imports: utils, lora.
"""

from stablelora_jax.optimizers.allora import allora
from stablelora_jax.optimizers.altlora import altlora, altlora_plus
from stablelora_jax.optimizers.balora import balance_after, balora
from stablelora_jax.optimizers.loft import loft
from stablelora_jax.optimizers.lora_fa import freeze_a, lora_fa
from stablelora_jax.optimizers.lora_muon import lora_muon
from stablelora_jax.optimizers.lora_plus import lora_plus
from stablelora_jax.optimizers.lora_pre import lora_pre
from stablelora_jax.optimizers.lora_pro import lora_pro, scale_by_lora_pro
from stablelora_jax.optimizers.lora_rite import lora_rite, scale_by_lora_rite
from stablelora_jax.optimizers.oplora import oplora
from stablelora_jax.optimizers.pair_tree import scales
from stablelora_jax.optimizers.rank_rule import rate_factor
from stablelora_jax.optimizers.riemannian import riemannian, scale_by_riemannian, scaled_adamw, scaled_gd
from stablelora_jax.optimizers.stable_lora import (
    ShrinkUntilStableState,
    latches,
    shrink_until_stable,
    stable_lora,
    still_shrinking,
)
from stablelora_jax.optimizers.stiefel_lora import stiefel_lora

__all__ = [
    "ShrinkUntilStableState",
    "allora",
    "altlora",
    "altlora_plus",
    "balance_after",
    "balora",
    "freeze_a",
    "latches",
    "loft",
    "lora_fa",
    "lora_muon",
    "lora_plus",
    "lora_pre",
    "lora_pro",
    "lora_rite",
    "oplora",
    "rate_factor",
    "riemannian",
    "scale_by_lora_pro",
    "scale_by_lora_rite",
    "scale_by_riemannian",
    "scaled_adamw",
    "scaled_gd",
    "scales",
    "shrink_until_stable",
    "stable_lora",
    "stiefel_lora",
    "still_shrinking",
]
