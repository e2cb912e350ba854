"""One typed configuration for each optimizer, read off the optimizer itself: signature, defaults and docstring.

``optimizer: {name: lora_rite, learning_rate: 2e-3}`` in a YAML is checked against ``lora_rite``'s own arguments. Left
out are those that no file can give: ``scale``, which comes from the adapters, and ``gradient`` of OPLoRA, whose
full form needs the gradients of whole kernels.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_type_hints

import optax

from stablelora_jax import optimizers
from stablelora_jax.config.keys import option
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
    "oplora": optimizers.oplora,
    "lora_pre": optimizers.lora_pre,
    "stiefel_lora": optimizers.stiefel_lora,
    "lora_fa": optimizers.lora_fa,
}
ALIASES = {"riemannian": "scaled_adamw"}
NOT_IN_A_FILE = ("scale", "gradient")
FREEZES_A = ("lora_fa",)  # the loss sees freeze_a(adapters)
PEAKS = {"scaled_gd": 1e-2, "lora_rite": 2e-3, "altlora": 1e-3, "oplora": 1e-2, "lora_fa": 1e-3}  # others 1e-4


def learning_rates(config: Any) -> dict[str, float]:
    """The learning rates of ``config``, by the names of its keys."""
    return {key: rate for key, rate in _arguments(config).items() if key.endswith("learning_rate") and rate is not None}


def make_optimizer(
    config: Any, schedule: Callable[[Any], optax.Schedule], rates: Mapping[str, Any], scale: Callable[[], Any]
) -> optax.GradientTransformation:
    """The optimizer that ``config``, one of :data:`CONFIGS`, describes.

    Args:
      config: all but its learning rates.
      schedule: makes one from a peak.
      rates: the peaks, concrete or traced, with the names of :func:`learning_rates`.
      scale: gives the LoRA scale of each pair, where the optimizer asks for it.
    """
    function, given = function_of(config), _arguments(config)
    given |= {key: schedule(rate) for key, rate in rates.items()}
    if "scale" in inspect.signature(function).parameters:
        given["scale"] = scale()
    tx = function(**given)
    ratio = getattr(config, "shrink_until_stable", 0)
    return optimizers.shrink_until_stable(tx, ratio) if ratio else tx


def function_of(config: Any) -> Callable[..., optax.GradientTransformation]:
    """The optimizer that ``config`` names."""
    return OPTIMIZERS[ALIASES.get(config.name, config.name)]


def shrink_ratio(config: Any) -> float | None:
    """The ratio by which this optimizer shrinks A until pairs are stable; None where it does not."""
    return getattr(config, "shrink_ratio", 0) or getattr(config, "shrink_until_stable", 0) or None


def trained_part(config: Any) -> Callable[[Any], Any]:
    """What the loss differentiates of the adapters: all, or with A as a constant."""
    return optimizers.freeze_a if config.name in FREEZES_A else lambda adapters: adapters


def _arguments(config: Any) -> dict[str, Any]:
    own = inspect.signature(function_of(config)).parameters
    return {key: value for key, value in dataclasses.asdict(config).items() if key in own}


def _make(name: str, function: Callable[..., Any]) -> type:
    """The dataclass of one optimizer."""
    text = inspect.getdoc(function) or ""
    title = text.split("\n")[0].replace("``", "").rstrip(".")
    names = (name, *(alias for alias, meant in ALIASES.items() if meant == name))
    fields: list[Any] = [("name", Literal[names], option(name, title))]
    hints = get_type_hints(function)
    for key, parameter in inspect.signature(function).parameters.items():
        if key not in NOT_IN_A_FILE:
            default = PEAKS.get(name, 1e-4) if parameter.default is inspect.Parameter.empty else parameter.default
            fields.append((key, _kind(hints[key], default), option(default, _meaning(text, key))))
    if "shrink_ratio" not in hints:
        meaning = "shrink ratio of Stable-LoRA around this optimizer; 0 for none"
        fields.append(("shrink_until_stable", float, option(0.0, meaning)))
    return dataclasses.make_dataclass(
        "".join(part.title() for part in name.split("_")) + "Config",
        fields,
        frozen=True,
        namespace={"__post_init__": _check, "__doc__": title, "__module__": __name__},
    )


def _kind(hint: Any, default: Any) -> Any:
    """The type of a key: what may be a scalar or a schedule is a number in a file."""
    may_be_none = NoneType in get_args(hint)
    return hint if may_be_none or not isinstance(default, float) else float


def _meaning(text: str, key: str) -> str:
    """The argument's entry in the docstring, as one line."""
    found = re.search(rf"^  {key}: (.*(?:\n    .*)*)", text, re.MULTILINE)
    line = " ".join((found[1] if found else "").split()).replace("``", "").replace("None", "null").rstrip(".")
    line = re.sub(r",? ?(a )?scalar or (optax )?schedule", "", re.sub(r":\w+:`~?([\w.]+)`", r"\1", line))
    return f"peak learning rate{': ' * bool(line)}{line}" if key == "learning_rate" else line


def _check(config: Any) -> None:
    require_numbers(shrink_until_stable=getattr(config, "shrink_until_stable", 0.0))
    function_of(config)(**_arguments(config))  # what the optimizer itself refuses


CONFIGS = {name: _make(name, function) for name, function in OPTIMIZERS.items()}
if TYPE_CHECKING:
    OptimizerConfig = Any
else:
    OptimizerConfig = Union[tuple(CONFIGS.values())]  # noqa: UP007
