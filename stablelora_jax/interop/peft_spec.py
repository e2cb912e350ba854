"""The spec of a PEFT adapter and the modules that it adapts: from our record beside it, or its own configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from stablelora_jax.interop.own_record import PAIRS, recorded_spec, recorded_targets
from stablelora_jax.interop.peft_config import from_peft_config, to_peft_config, without_start
from stablelora_jax.interop.peft_experts import read_expert_targets
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.peft_config import from_peft
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError

NOT_OF_SPEC = ("base_model_name_or_path", "task_type", "inference_mode", "ensure_weight_tying")
NOT_OF_TUNERS = ("rank_pattern", "target_r", "sparse")  # what write_tensors adds


def read_spec(
    raw: Mapping[str, Any], record: Mapping[str, Any], params: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[LoraSpec, dict[tree.Path, TargetModule], list[str]]:
    """The spec of a directory's adapter, the adapted modules, and what was dropped of the configuration.

    The spec on record counts where the config still says it.

    Args:
      raw: the content of ``adapter_config.json``.
      record: the content of ``stablelora.json``.
      params: of the base.
      tensors: of the file, by name.

    Raises:
      InputError: as :func:`.from_peft_config`; ``params`` are of another model.
    """
    own = recorded_spec(record)
    if own is not None:
        try:
            targets = find_target_modules(params, own)
        except InputError:
            targets = {}
        if _sizes(targets) != _recorded_sizes(record):  # not told by names and shapes
            targets = recorded_targets(record, own, params)
        if _same_config(raw, to_peft_config(own, targets.values(), None, params, ())):
            return own, targets, []
    if raw.get("target_parameters"):
        return *_read_experts(raw, tensors, params), []
    spec, dropped = from_peft_config(raw, params)
    return spec, find_target_modules(params, spec), dropped


def _read_experts(
    raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray], params: Mapping[str, Any]
) -> tuple[LoraSpec, dict[tree.Path, TargetModule]]:
    """The spec and the adapted modules of another program's adapter of experts."""
    raw = without_start(raw)
    spec = from_peft(raw)
    targets = read_expert_targets(raw, tensors, spec, params)
    if modules := raw.get("target_modules"):
        targets |= find_target_modules(params, from_peft({**raw, "target_modules": modules, "target_parameters": None}))
    return spec, targets


def _sizes(targets: Mapping[tree.Path, TargetModule]) -> dict[tree.Path, Any]:
    return {path: (target.stack, target.size) for path, target in targets.items()}


def _recorded_sizes(record: Mapping[str, Any]) -> dict[tree.Path, Any]:
    """What :func:`_sizes` gives of the adapter on record; {} if it is damaged."""
    try:
        return {tuple(p["path"]): (tuple(p["stack"]), tuple(p["size"])) for p in record.get(PAIRS) or ()}
    except (KeyError, TypeError):
        return {}


def _same_config(raw: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Whether a config says of the adapter what was written for it; lists may be in another order."""
    besides = () if written["peft_type"] == "LORA" else NOT_OF_TUNERS
    ours = {key: value for key, value in written.items() if key not in (*NOT_OF_SPEC, *besides)}
    raw, written = ({key: value for key, value in config.items() if key not in besides} for config in (raw, written))
    return set(raw) == set(written) and all(_text(raw[key]) == _text(value) for key, value in ours.items())


def _text(value: Any) -> str:
    """A value of a config as JSON, in which 2 is not 2.0."""
    return json.dumps(sorted(value, key=str) if isinstance(value, list) else value)
