"""stablelora_jax: LoRA for JAX as a functional transform of parameters, with Stable-LoRA at its heart.

See README.md for the quick start; every public name is documented where it is defined.
"""

from stablelora_jax.data import Batch
from stablelora_jax.generation.bank import banked, make_bank, replace_adapter
from stablelora_jax.generation.generate import generate
from stablelora_jax.interop import load_peft, save_peft
from stablelora_jax.interop.warm_start import start_adapters
from stablelora_jax.lora.apply import adapted
from stablelora_jax.lora.combine import combine
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.summary import describe
from stablelora_jax.lora.transform import init_adapters, lora_hyperparams, merge, unmerge
from stablelora_jax.models.pretrained.load import base_directory, load_pretrained, save_pretrained
from stablelora_jax.models.untie import untie
from stablelora_jax.optimizers import (
    allora,
    altlora,
    altlora_plus,
    freeze_a,
    lora_fa,
    lora_plus,
    lora_pre,
    lora_pro,
    lora_rite,
    oplora,
    riemannian,
    scaled_adamw,
    scaled_gd,
    scales,
    shrink_until_stable,
    stable_lora,
    stiefel_lora,
    still_shrinking,
)
from stablelora_jax.optimizers.freeze import freeze, freeze_mask, stop_frozen_gradients
from stablelora_jax.training import checkpoint
from stablelora_jax.training.loss import summed_loss
from stablelora_jax.utils.errors import InputError, RunError
from stablelora_jax.utils.fingerprint import fingerprint

__all__ = [
    "Batch",
    "InputError",
    "LoraSpec",
    "RunError",
    "adapted",
    "allora",
    "altlora",
    "altlora_plus",
    "banked",
    "base_directory",
    "checkpoint",
    "combine",
    "describe",
    "fingerprint",
    "freeze",
    "freeze_a",
    "freeze_mask",
    "generate",
    "init_adapters",
    "load_peft",
    "load_pretrained",
    "lora_fa",
    "lora_hyperparams",
    "lora_plus",
    "lora_pre",
    "lora_pro",
    "lora_rite",
    "make_bank",
    "merge",
    "oplora",
    "replace_adapter",
    "riemannian",
    "save_peft",
    "save_pretrained",
    "scaled_adamw",
    "scaled_gd",
    "scales",
    "shrink_until_stable",
    "stable_lora",
    "start_adapters",
    "stiefel_lora",
    "still_shrinking",
    "stop_frozen_gradients",
    "summed_loss",
    "unmerge",
    "untie",
]
