"""Stacks of layers that the spec does not know, told from the shapes that a model's modules see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


def require_stacks(
    apply: Callable[[Any], Any], variables: Mapping[str, Any], targets: Mapping[Path, TargetModule]
) -> None:
    """Check that ``nn.scan`` and ``nn.vmap`` slice the kernels of ``targets`` as the spec says.

    Args:
      apply: the base model as a function of its variables; it is traced, not run.
      variables: the base's collections.
      targets: the modules that the spec selects.

    Raises:
      InputError: naming a module whose kernel is sliced in another way, and what to say in the spec.
    """
    for path, seen in _kernel_shapes(apply, variables, targets).items():
        whole, depth = tree.get_in(variables["params"], path)[targets[path].leaf].shape, len(targets[path].stack)
        if seen == whole[depth:]:
            continue
        name = ".".join(path)
        shapes = f"{name}: its kernel is {whole} in the parameters and {seen} inside the model"
        if len(seen) == len(whole) - depth:
            raise InputError(f"{shapes}: make adapters with adapted(model, spec).init(key, params, *args)")
        raise InputError(
            f"{shapes}: make adapters with adapted(model, spec).init(key, params, *args), or name the module that "
            f"nn.scan or nn.vmap stacks in stacked, {_stacked(path)}"
        )


def _stacked(path: Path) -> str:
    """What a spec may say: the modules above that of ``path``."""
    return " or ".join(f"LoraSpec(stacked=({part!r},))" for part in path[:-1]) or "which is not above a module"


def _kernel_shapes(
    apply: Callable[[Any], Any], variables: Mapping[str, Any], targets: Mapping[Path, TargetModule]
) -> dict[Path, tuple[int, ...]]:
    """The shapes of the kernels of ``targets`` as the modules see them, sliced by scans and vmaps."""
    shapes: dict[Path, tuple[int, ...]] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        path: Any = module.path if module.scope is not None else None
        if path in targets and targets[path].leaf in module.variables.get("params", {}):
            shapes[path] = module.variables["params"][targets[path].leaf].shape
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(apply, dict(variables))
    return shapes
