"""One typed configuration for each optimizer, read off the optimizer itself: signature, defaults and docstring.

``optimizer: {name: lora_rite, learning_rate: 2e-3}`` in a YAML is checked against ``lora_rite``'s own arguments. Left
out are those that no file can give: ``scale``, which comes from the adapters, and ``gradient`` of OPLoRA, whose
full form needs the gradients of whole kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import optax

from stablelora_jax import optimizers
from stablelora_jax.config.engine import Section
from stablelora_jax.config.keys import option
from stablelora_jax.config.members import arguments_of, member
from stablelora_jax.optimizers.limits import require_numbers


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """AdamW, the baseline.

    Args:
      learning_rate: scalar or schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, scalar or schedule.

    Raises:
      InputError: a number out of range.
    """
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "stable_lora": optimizers.stable_lora,
    "adamw": adamw,
    "lora_plus": optimizers.lora_plus,
    "scaled_gd": optimizers.scaled_gd,
    "scaled_adamw": optimizers.scaled_adamw,
    "lora_rite": optimizers.lora_rite,
    "lora_pro": optimizers.lora_pro,
    "altlora": optimizers.altlora,
    "altlora_plus": optimizers.altlora_plus,
    "allora": optimizers.allora,
    "balora": optimizers.balora,
    "loft": optimizers.loft,
    "lora_muon": optimizers.lora_muon,
    "oplora": optimizers.oplora,
    "lora_pre": optimizers.lora_pre,
    "stiefel_lora": optimizers.stiefel_lora,
    "lora_fa": optimizers.lora_fa,
}
ALIASES = {"riemannian": "scaled_adamw"}
NOT_IN_A_FILE = ("scale", "gradient")
FREEZES_A = ("lora_fa",)  # the loss sees freeze_a(adapters)
PEAKS = {"scaled_gd": 1e-2, "lora_rite": 2e-3, "altlora": 1e-3, "oplora": 1e-2, "lora_fa": 1e-3, "lora_muon": 5e-3}
# all others: 1e-4


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """An optimizer: ``name`` and its arguments. The classes of :data:`CONFIGS` derive from it."""

    name: str
    learning_rate: float

    function: ClassVar[Callable[..., optax.GradientTransformation]]

    def __post_init__(self) -> None:
        """Check the arguments: their types, and what the optimizer itself refuses."""
        super().__post_init__()
        require_numbers(shrink_until_stable=getattr(self, "shrink_until_stable", 0.0))
        type(self).function(**arguments_of(self))


def learning_rates(config: OptimizerConfig) -> dict[str, float]:
    """The learning rates of ``config``, by the names of its keys."""
    given = arguments_of(config).items()
    return {key: rate for key, rate in given if key.endswith("learning_rate") and rate is not None}


def make_optimizer(
    config: OptimizerConfig,
    schedule: Callable[[Any], optax.Schedule],
    rates: Mapping[str, Any],
    scale: Callable[[], Any],
    numbers: Mapping[str, Any] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """The optimizer that ``config`` describes.

    Args:
      config: all but its learning rates.
      schedule: makes one from a peak.
      rates: the peaks, concrete or traced, with the names of :func:`learning_rates`.
      scale: gives the LoRA scale of each pair, where the optimizer asks for it.
      numbers: arguments of the optimizer, concrete or traced, in place of those of ``config``.
    """
    function, given = type(config).function, arguments_of(config)
    given |= {key: schedule(rate) for key, rate in rates.items()}
    given |= numbers
    if "scale" in inspect.signature(function).parameters:
        given["scale"] = scale()
    tx = function(**given)
    ratio = getattr(config, "shrink_until_stable", 0)
    return optimizers.shrink_until_stable(tx, ratio) if ratio else tx


def shrink_ratio(config: OptimizerConfig) -> float | None:
    """The ratio by which this optimizer shrinks A until pairs are stable; None where it does not."""
    return getattr(config, "shrink_ratio", 0) or getattr(config, "shrink_until_stable", 0) or None


def trained_part(config: OptimizerConfig) -> Callable[[Any], Any]:
    """What the loss differentiates of the adapters: all, or with A as a constant."""
    return optimizers.freeze_a if config.name in FREEZES_A else lambda adapters: adapters


def _section(name: str, function: Callable[..., optax.GradientTransformation]) -> Any:
    names = (name, *(alias for alias, meant in ALIASES.items() if meant == name))
    shrink = option(0.0, "shrink ratio of Stable-LoRA around this optimizer; 0 for none")
    more = [] if "shrink_ratio" in inspect.signature(function).parameters else [("shrink_until_stable", float, shrink)]
    peak = {"learning_rate": PEAKS.get(name, 1e-4)}
    return member(function, OptimizerConfig, *names, skip=NOT_IN_A_FILE, defaults=peak, more=more)


CONFIGS: dict[str, Callable[..., OptimizerConfig]] = {name: _section(name, f) for name, f in OPTIMIZERS.items()}
