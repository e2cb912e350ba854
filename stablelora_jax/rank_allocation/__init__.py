"""The axis of rank allocation: which ranks of an adapter are trained, and when. One file each, one line here.

Imports: utils, lora.

A member is a function ``(spec, steps, **options) -> Allocation``: what it changes in a training of ``steps`` steps of
adapters of ``spec``. The functions that it is made of are public, for a loop of one's own.
"""

from collections.abc import Callable

from stablelora_jax.rank_allocation.adalora import adalora
from stablelora_jax.rank_allocation.allocation import Allocation
from stablelora_jax.rank_allocation.cola import cola
from stablelora_jax.rank_allocation.dylora import dylora
from stablelora_jax.rank_allocation.matryoshka import matryoshka
from stablelora_jax.rank_allocation.squeeze import squeeze

__all__ = ["RANK_ALLOCATIONS", "Allocation"]

RANK_ALLOCATIONS: dict[str, Callable[..., Allocation]] = {
    "adalora": adalora,
    "cola": cola,
    "dylora": dylora,
    "matryoshka": matryoshka,
    "squeeze": squeeze,
}
