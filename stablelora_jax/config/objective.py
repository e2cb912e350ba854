"""One typed configuration for each objective, read off the objective itself: signature, defaults and docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stablelora_jax import objectives
from stablelora_jax.config.engine import Section
from stablelora_jax.config.members import arguments_of, member

ARRAYS = ("completion", "chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_length", "rejected_length")


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """An objective: ``name`` and its arguments. The classes of :data:`CONFIGS` derive from it."""

    name: str

    function: ClassVar[Callable[..., jax.Array]]

    def __post_init__(self) -> None:
        """Check the arguments: their types, and what the objective itself refuses."""
        super().__post_init__()
        function: Any = type(self).function
        jax.eval_shape(partial(function, **arguments_of(self)), **{name: _NUMBER for name in arrays_of(function)})


_NUMBER = jax.ShapeDtypeStruct((1,), jnp.float32)


def arrays_of(function: Callable[..., Any]) -> list[str]:
    """The arguments of an objective that come from a model."""
    return [name for name in inspect.signature(function).parameters if name in ARRAYS]


def takes_pairs(config: ObjectiveConfig) -> bool:
    """Whether the objective is over pairs of rows, of which the first is preferred."""
    return "rejected" in arrays_of(type(config).function)


def _section(function: Callable[..., jax.Array]) -> Any:
    return member(function, ObjectiveConfig, skip=ARRAYS)


CONFIGS: dict[str, Callable[..., ObjectiveConfig]] = {
    function.__name__: _section(function)
    for function in (objectives.sft, objectives.dpo, objectives.orpo, objectives.simpo)
}
