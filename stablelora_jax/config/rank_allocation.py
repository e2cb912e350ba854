"""One typed configuration for each rank allocation, read off its function: signature, defaults and docstring.

``rank_allocation: {name: dylora}`` in a YAML, or ``rank_allocation.name=dylora``. The spec and the steps are the run's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from stablelora_jax.config.engine import Section
from stablelora_jax.config.members import arguments_of, member
from stablelora_jax.config.optimizer import OptimizerConfig
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.rank_allocation import RANK_ALLOCATIONS, Allocation
from stablelora_jax.utils.errors import InputError

# optimizers whose update of one rank depends on the gradients of the others: what is not in use would not rest
MIX_RANKS = (
    "scaled_gd",
    "scaled_adamw",
    "riemannian",
    "lora_rite",
    "lora_pro",
    "altlora",
    "altlora_plus",
    "loft",
    "lora_muon",
    "oplora",
    "stiefel_lora",
    "balora",
)


@dataclass(frozen=True)
class RankAllocationConfig(Section):
    """A rank allocation: ``name`` and its options. The classes of :data:`CONFIGS` derive from it."""

    name: str

    function: ClassVar[Callable[..., Allocation]]


CONFIGS: dict[str, Callable[..., RankAllocationConfig]] = {
    name: member(function, RankAllocationConfig, name, skip=("spec", "steps"))
    for name, function in RANK_ALLOCATIONS.items()
}


def allocation_of(
    config: RankAllocationConfig | None, spec: LoraSpec, optimizer: OptimizerConfig, steps: int
) -> Allocation:
    """What the rank allocation of a run changes; nothing where ``config`` is None.

    Raises:
      InputError: it has no meaning for the spec, the optimizer or so many steps; the message names the key.
    """
    if config is None:
        return Allocation()
    if config.name == "dylora" and optimizer.name in MIX_RANKS:
        raise InputError(
            f"rank_allocation: dylora trains some ranks while the others rest, and optimizer {optimizer.name} moves "
            "all of them at once: say optimizer: {name: adamw}, stable_lora, lora_plus, allora, lora_pre or lora_fa"
        )
    try:
        return type(config).function(spec=spec, steps=steps, **arguments_of(config))
    except InputError as error:
        raise InputError(f"rank_allocation: {error}") from None
