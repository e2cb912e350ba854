"""The axis of initialisations: where a pair starts. One file each, one line here.

A member is a function ``(key, w, rank, dtype) -> (pair, w0)`` for one kernel ``w`` (in, out): deterministic in the
key, ``w0`` is the base to train on, and ``w0 + s A B == w`` where the method promises it.
"""

from stablelora_jax.lora.initializers.embedding import embedding
from stablelora_jax.lora.initializers.kaiming import kaiming

__all__ = ["INITIALIZERS", "embedding"]

INITIALIZERS = {
    "kaiming": kaiming,
}
