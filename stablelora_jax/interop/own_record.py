"""The spec and the pairs of an adapter in ``stablelora.json``: what PEFT's ``adapter_config.json`` has no words for.

PEFT names modules of PyTorch. Which axes of a JAX leaf are stacked and contracted, and which leaf a pair belongs to, is
known to the spec and to a trace of the model; the record holds the whole spec, and of each pair its path and shape, so
that an adapter of any model can be read back without either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stablelora_jax.lora.pairs import TargetModule, adapter_target_modules, make_target_module, pair_shapes
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import match_target_modules
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

SPEC, PAIRS = "spec", "pairs"
LEAVES = ("kernel", "embedding", "w", "weight")  # that have their module's name


def own_record(adapters: Any, spec: LoraSpec) -> dict[str, Any]:
    """What :func:`recorded_spec` and :func:`recorded_targets` read."""
    shapes = pair_shapes(adapters)
    pairs = [
        {"path": list(path), "stack": list(stack), "size": list(size)} for path, (stack, _, size) in shapes.items()
    ]
    return {SPEC: spec.to_dict(), PAIRS: pairs}


def recorded_spec(record: Mapping[str, Any]) -> LoraSpec | None:
    """The spec that an adapter was saved with; None where it is not on record or not readable."""
    given = record.get(SPEC)
    if not isinstance(given, Mapping):
        return None
    try:
        return LoraSpec(**given)
    except (InputError, TypeError):
        return None


def recorded_targets(record: Mapping[str, Any], spec: LoraSpec, params: Mapping[str, Any]) -> dict[Path, TargetModule]:
    """The adapted modules of an adapter of any model.

    Raises:
      InputError: they are not on record, or ``params`` are of another model.
    """
    found = {}
    for pair in record.get(PAIRS) or ():
        try:
            path, stack, size = (tuple(pair[key]) for key in ("path", "stack", "size"))
            target = make_target_module(path, stack, size, spec, leaf_name(params, path))
        except (KeyError, TypeError, ValueError, IndexError):
            raise InputError("its pairs are damaged") from None
        require_fitting(target, params)
        found[path] = target
    if not found:
        raise InputError("it has no record of its pairs")
    return found


def saved_targets(adapters: Any, spec: LoraSpec, params: Mapping[str, Any]) -> dict[Path, TargetModule]:
    """The adapted modules of ``adapters``: by names and shapes of ``params``, or where those do not tell, by the pairs.

    Raises:
      InputError: the adapters do not fit ``params``.
    """
    try:
        return match_target_modules(params, adapters, spec)
    except InputError as error:
        try:
            targets = adapter_target_modules(adapters, spec)
            for path, target in targets.items():
                require_fitting(target, params)
                targets[path] = target._replace(leaf=leaf_name(params, path))
        except InputError:
            raise error from None
        return targets


def leaf_name(params: Mapping[str, Any], path: Path) -> str:
    """The name of the leaf that the pair at ``path`` changes; "" where it is at ``path`` itself."""
    node = tree.get_in(params, path)
    return next((name for name in LEAVES if name in node), "kernel") if isinstance(node, Mapping) else ""


def require_fitting(target: TargetModule, params: Mapping[str, Any]) -> None:
    """Check that ``params`` have a leaf of the size that the pair at ``target`` is for.

    Raises:
      InputError: they do not; it names the pair.
    """
    node = tree.get_in(params, target.path)
    leaves: list[Any] = [node.get(name) for name in LEAVES] if isinstance(node, Mapping) else [node]
    sizes = [math.prod(leaf.shape) for leaf in leaves if hasattr(leaf, "shape")]
    if math.prod((*target.stack, *target.size)) not in sizes:
        raise InputError(
            f"{'.'.join(target.path)}: the pair is for a leaf of {(*target.stack, *target.size)}, which these params "
            "do not have there: they are of another model"
        )
