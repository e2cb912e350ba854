"""The spec and the pairs of an adapter in ``stablelora.json``: what PEFT's ``adapter_config.json`` has no words for.

PEFT names modules of PyTorch. Which axes of a JAX leaf are stacked and contracted, and which leaf a pair belongs to, is
known to the spec and to a trace of the model; the record holds the whole spec, and of each pair its path and shape, so
that an adapter of any model can be read back without either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.lora.fitting import leaf_name, require_fitting
from stablelora_jax.lora.pairs import TargetModule, make_target_module
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

SPEC, PAIRS = "spec", "pairs"


def own_record(targets: Mapping[Path, TargetModule], spec: LoraSpec) -> dict[str, Any]:
    """What :func:`recorded_spec` and :func:`recorded_targets` read."""
    pairs = [
        {"path": list(path), "stack": list(target.stack), "size": list(target.size)} for path, target in targets.items()
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
            target = make_target_module(path, stack, size, spec, leaf_name(params, path), looked_up=False)
        except (KeyError, TypeError, ValueError, IndexError):
            raise InputError("its pairs are damaged") from None
        require_fitting(target, params)
        found[path] = target
    if not found:
        raise InputError("it has no record of its pairs")
    return found
