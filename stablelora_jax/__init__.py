"""stablelora_jax: LoRA for JAX as a functional transform of parameters, with Stable-LoRA at its heart.

See README.md for the quick start; every public name is documented where it is defined.
"""

from stablelora_jax.adapter import LoraSpec
from stablelora_jax.describe import describe
from stablelora_jax.errors import InputError
from stablelora_jax.intercept import adapted
from stablelora_jax.interop import load_peft, save_peft
from stablelora_jax.models.pretrained import base_directory, load_pretrained, save_pretrained
from stablelora_jax.optimize import shrink_until_stable, stable_lora, still_shrinking
from stablelora_jax.transform import hyper, init_adapters, merge, unmerge

__all__ = [
    "InputError",
    "LoraSpec",
    "adapted",
    "base_directory",
    "describe",
    "hyper",
    "init_adapters",
    "load_peft",
    "load_pretrained",
    "merge",
    "save_peft",
    "save_pretrained",
    "shrink_until_stable",
    "stable_lora",
    "still_shrinking",
    "unmerge",
]
