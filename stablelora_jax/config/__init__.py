"""Configuration: dataclasses from YAML files and ``key=value`` overrides. Each key is a field of a dataclass here.

Imports: utils, lora, optimizers, objectives, rank_allocation.
"""

from stablelora_jax.config.dump import dump, to_dict
from stablelora_jax.config.engine import Section, load
from stablelora_jax.config.help import help_text
from stablelora_jax.config.keys import REQUIRED, option, section, with_new_names

__all__ = ["REQUIRED", "Section", "dump", "help_text", "load", "option", "section", "to_dict", "with_new_names"]
