"""Several adapters of one base made into one."""

from stablelora_jax.lora.combine.arguments import METHODS
from stablelora_jax.lora.combine.weighted import combine

__all__ = ["METHODS", "combine"]
