"""``LoraSpec`` <-> PEFT's ``adapter_config.json``, for a given model.

:mod:`stablelora_jax.lora.peft_config` translates the fields; here their names and patterns are resolved against the
modules of a model, where PEFT's rules and ours differ.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flax.traverse_util import flatten_dict

from stablelora_jax.interop.peft_experts import is_experts, parameter_names, without_experts
from stablelora_jax.interop.peft_layout import HEAD, is_tied
from stablelora_jax.lora.names import hits, layer_number, matches, module_names, stack_depth, suffixes
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.peft_config import make_spec, spec_arguments
from stablelora_jax.lora.peft_tuners import START, TUNERS, Tuner, form_of, tuner_words
from stablelora_jax.lora.spec import LoraSpec, shown
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError

# What init_lora_weights says about a trained adapter. The pairs come from the file; they are beside the base as it is,
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
SUBTRACTED_INIT = ("pissa", "olora")  # or beside what is left of it without a start that the base tells.


def to_peft_config(
    spec: LoraSpec,
    targets: Iterable[TargetModule],
    base_model: str | None,
    params: Mapping[str, Any] | None,
    tensors: Sequence[str],
) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for adapters at ``targets`` of ``params`` (or None), LoRA's or a tuner's.

    Lists and pattern maps mean the same in PEFT and are written unchanged. ``all-linear`` and regular expressions are
    written as the list of modules that they select: PEFT would match an expression with containers too, which have no
    weights, and vLLM needs a list. The keys of pattern maps keep their order: the first match wins.

    Args:
      spec: the spec of the adapters.
      targets: the adapted modules.
      base_model: for ``base_model_name_or_path``.
      params: of the base, or None where ``modules_to_save`` is empty.
      tensors: names of the tensors in the file, by which a tied head is recognised.

    Example::

        >>> from stablelora_jax.lora.target_modules import find_target_modules
        >>> import numpy as np
        >>> params = {"a": {"kernel": np.zeros((3, 2))}, "b": {"kernel": np.zeros((3, 2))}}
        >>> spec = LoraSpec(target_modules="all-linear")
        >>> to_peft_config(spec, find_target_modules(params, spec).values(), None, params, [])["target_modules"]
        ['a', 'b']
    """
    targets = list(targets)
    experts = [target for target in targets if is_experts(target, spec)]
    single = [target for target in targets if target not in experts]
    chosen = [name for target in single for name, rank in zip(target.names, target.ranks, strict=True) if rank]
    # PEFT adapts a module that is named whole whatever layers_to_transform says
    whole = isinstance(spec.target_modules, tuple) and any(
        "." in entry or entry == HEAD for entry in spec.target_modules
    )
    listed = isinstance(spec.target_modules, tuple) and not (whole and spec.layers_to_transform is not None)
    tuner = TUNERS.get(spec.parametrization)
    lacks = tuner.lacks if tuner else ()
    lacked = [key for key in ("exclude_modules", "layers_to_transform") if key in lacks and getattr(spec, key)]
    listed = listed and not lacked
    if "bias" in lacks and spec.bias != "none":
        raise InputError(f"PEFT's {spec.parametrization} trains no biases: leave peft_type out")
    target = list(spec.target_modules) if listed else chosen
    if experts and listed:
        target = without_experts(target, targets, spec)
    tied = params is not None and is_tied(params) and any(name.startswith(f"{HEAD}.") for name in tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base_model is None else str(base_model),
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.scaling in ("rslora", "rora"),
        "use_dora": spec.parametrization == "dora",
        "lora_dropout": 0.0 if experts else spec.dropout,  # PEFT has no dropout before experts
        "target_modules": target,
        **({"target_parameters": [n for one in experts for n in parameter_names(one, spec)]} if experts else {}),
        "exclude_modules": _plain(spec.exclude_modules) if listed and spec.exclude_modules else None,
        "layers_to_transform": list(spec.layers_to_transform)
        if listed and spec.layers_to_transform is not None
        else None,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "bias": spec.bias,
        "lora_bias": spec.lora_bias,
        "modules_to_save": _to_saved(spec, params),
        "ensure_weight_tying": tied,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    return tuner_words(config, spec.parametrization, spec.arguments) if tuner else config


def from_peft_config(raw: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[LoraSpec, list[str]]:
    """The spec of a trained adapter's config for the model with ``params``, and the entries that were dropped.

    PEFT ignores names that match no module, and such files are common. They are dropped here: the tensors beside the
    config show what is adapted.

    Args:
      raw: the content of ``adapter_config.json``.
      params: of the base.

    Returns:
      ``(spec, dropped)``, the latter as texts for a warning.

    Raises:
      InputError: another type of adapter, a feature that a spec does not have, or a missing key.
    """
    tuner = TUNERS.get(form_of(raw) or "")
    required = [key for key, own in tuner.renamed.items() if own == "r"] if tuner else ["r", "lora_alpha"]
    if raw.get("peft_type") not in (None, "LORA") and tuner is None:
        required = []  # it is the type that cannot be read
    for key in ("peft_type", "target_modules", *required):
        if raw.get(key) is None:
            raise InputError(f"the key {key} is missing")
    given = spec_arguments({**without_start(raw, tuner), "task_type": None})  # heads of a task come from the file
    modules = [
        name for target in find_target_modules(params, LoraSpec(target_modules=".*")).values() for name in target.names
    ]
    dropped: list[str] = []
    resolved = {key: _matching(key, given[key], modules, dropped) for key in ("target_modules", "exclude_modules")}
    resolved |= {
        "layers_to_transform": _matching_layers(given["layers_to_transform"], modules, dropped),
        "modules_to_save": _from_saved(given["modules_to_save"], params, dropped),
        "bias": _matching_bias(given["bias"], params, dropped),
    }
    tables = ("rank_pattern", "alpha_pattern")
    spec = make_spec({**given, **resolved, **dict.fromkeys(tables, {})})
    spec = _whole_names(spec, modules)
    chosen = [name for name in modules if spec.selects(name)]
    if spec.bias == "lora_only" and not any(_has_bias(params, name) for name in chosen):
        spec, dropped = replace(spec, bias="none"), [*dropped, "bias 'lora_only'"]
    return replace(spec, **{key: _matching(key, given[key], chosen, dropped) for key in tables}), dropped


def without_start(raw: Mapping[str, Any], tuner: Tuner | None = None) -> dict[str, Any]:
    """A configuration without what it says about a start, on which a trained adapter does not depend.

    Raises:
      InputError: it does: the start has changed the base, by more than the base tells.
    """
    if tuner is not None:
        return {key: value for key, value in raw.items() if key not in START or isinstance(value, str)}
    init = raw.get("init_lora_weights")
    if not (init is None or isinstance(init, bool | str)) or init not in (*PLAIN_INIT, *SUBTRACTED_INIT):
        raise InputError(
            f"init_lora_weights = {shown(init)} is not supported: the adapter belongs to a base that the start has "
            "changed; PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...) makes plain LoRA of it"
        )
    return {**raw, "init_lora_weights": init if init in SUBTRACTED_INIT else True}


def _whole_names(spec: LoraSpec, modules: Sequence[str]) -> LoraSpec:
    """PEFT's rule: ``layers_to_transform`` does not apply to a module whose full name ``target_modules`` lists."""
    if (
        spec.layers_to_transform is None
        or not isinstance(spec.target_modules, tuple)
        or not set(spec.target_modules) & set(modules)
    ):
        return spec
    free = replace(spec, layers_to_transform=None)
    chosen = [n for n in modules if (spec.selects(n) or n in spec.target_modules) and free.selects(n)]
    return replace(free, target_modules=tuple(chosen))


def _has_bias(params: Mapping[str, Any], name: str) -> bool:
    path = tuple(part for part in name.split(".") if not part.isdigit())
    return tree.get_in(params, (*path, "bias")) is not None


def _matching(key: str, patterns: Any, modules: Sequence[str], dropped: list[str]) -> Any:
    """``patterns`` without those that match none of ``modules``, which are added to ``dropped``."""
    if isinstance(patterns, str):
        unused = key == "exclude_modules" and not any(matches(patterns, name) for name in modules)
        dropped += [f"{key} {patterns!r:.80}"] * unused
        return () if unused else patterns
    found = hits(patterns, modules) if key.endswith("pattern") else suffixes(modules) & set(patterns)
    dropped += [f"{key} {p!r:.80}" for p in patterns if p not in found]
    kept = [p for p in patterns if p in found]
    return {p: patterns[p] for p in kept} if isinstance(patterns, Mapping) else kept


def _matching_layers(layers: Any, modules: Sequence[str], dropped: list[str]) -> list[Any] | None:
    if layers is None:
        return None
    layers = layers if isinstance(layers, list) else [layers]
    found = {layer_number(name, ("layers",)) for name in modules}
    dropped += [
        f"layers_to_transform {shown(layer)}" for layer in layers if isinstance(layer, int) and layer not in found
    ]
    return [layer for layer in layers if not isinstance(layer, int) or layer in found]


def _matching_bias(bias: str, params: Mapping[str, Any], dropped: list[str]) -> str:
    """``bias``, or ``"none"`` if the model has no biases."""
    if bias != "none" and not any(path[-1] == "bias" for path in _flat(params)):
        dropped.append(f"bias {bias!r:.60}")
        return "none"
    return bias


def _flat(params: Mapping[str, Any]) -> dict[tree.Path, Any]:
    """The leaves of ``params`` by path; a quantised kernel is one leaf."""
    return flatten_dict(params)  # type: ignore[no-any-return]


def _names(params: Mapping[str, Any]) -> list[str]:
    """The dotted names of all modules of ``params``, including containers."""
    paths = {path[:-1]: leaf.shape for path, leaf in _flat(params).items()}
    names: dict[str, None] = {}
    for path, shape in sorted(paths.items()):
        depth = stack_depth(path, ("layers",))
        for name in module_names(path, shape[:depth], ("layers",)):
            parts = name.split(".")
            names |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    return list(names)


def _to_saved(spec: LoraSpec, params: Mapping[str, Any] | None) -> list[str] | None:
    """``modules_to_save`` for PEFT, where an entry selects every module whose name *ends with* its letters."""
    if not spec.modules_to_save or params is None:
        return None
    names = _names(params)
    stacks = {n.rpartition(".")[0] for n in names if "." in n and n.rpartition(".")[2].isdigit()}  # PEFT selects none
    layers = {name: name.rpartition(".")[0] for name in names if name.rpartition(".")[0] in stacks}
    ours = [n for n in names if n not in stacks and matches(spec.modules_to_save, n)]
    ours += [n for n, stack in layers.items() if matches(spec.modules_to_save, stack)]
    theirs = [name for name in names if name.endswith(spec.modules_to_save)]
    return list(spec.modules_to_save) if ours == theirs else ours


def _from_saved(entries: Sequence[str], params: Mapping[str, Any], dropped: list[str]) -> tuple[str, ...]:
    """PEFT's ``modules_to_save`` for a spec: the inverse of :func:`_to_saved`."""
    names = _names(params)
    backwards = sorted(name[::-1] for name in names)
    kept = tuple(entry for entry in entries if _ends_one(entry, backwards))
    found = set(kept)
    dropped += [f"modules_to_save {entry!r:.80}" for entry in dict.fromkeys(entries) if entry not in found]
    theirs = [name for name in names if kept and name.endswith(kept)]
    ours = [name for name in names if matches(kept, name)]
    return kept if ours == theirs else tuple(theirs)


def _ends_one(entry: str, backwards: Sequence[str]) -> bool:
    """Whether one of the names, reversed and sorted, ends with the letters of ``entry``."""
    start = entry[::-1]
    at = bisect.bisect_left(backwards, start)
    return at < len(backwards) and backwards[at].startswith(start)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
