"""Configuration: dataclasses from YAML files and ``key=value`` overrides. Each key is a field of a dataclass here.

Imports: utils, lora, optimizers.
"""

from stablelora_jax.config.engine import dump, help_text, load, option, section, to_dict

__all__ = ["dump", "help_text", "load", "option", "section", "to_dict"]
