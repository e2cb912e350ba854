"""``LoraSpec`` <-> PEFT's ``adapter_config.json``. A PEFT feature that a spec cannot express is refused by name."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flax.traverse_util import flatten_dict

from stablelora_jax.interop.peft_layout import HEAD, is_tied
from stablelora_jax.lora.names import hits, layer_number, matches, module_names, stack_depth, suffixes
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec, shown
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError

READ = frozenset(
    """r lora_alpha target_modules use_rslora use_dora lora_dropout exclude_modules layers_to_transform rank_pattern
    alpha_pattern modules_to_save bias lora_bias""".split()
)
# Neither the function of a loaded adapter nor its shapes depend on these.
INERT = frozenset(
    """peft_type peft_version task_type base_model_name_or_path revision inference_mode auto_mapping
    eva_config megatron_core runtime_config ensure_weight_tying qalora_group_size""".split()
)
# Initialisations that leave the base as it is; others (pissa, olora, loftq, ...) need the base they started from.
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def to_peft_config(
    spec: LoraSpec, targets: Iterable[TargetModule], base_model: str | None, params: Any, tensors: Sequence[str]
) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for adapters at ``targets`` of ``params`` (or None).

    Lists and pattern maps are written as they are, since they mean the same in PEFT; ``all-linear`` and regular
    expressions are written as the modules they stand for: PEFT would match an expression with containers too, which
    have no weights, and vLLM wants a list. Keys of pattern maps keep their order, which is meaning where two match one
    module (PEFT's own writer sorts them).
    """
    chosen = [name for target in targets for name, rank in zip(target.names, target.ranks, strict=True) if rank]
    # PEFT adapts a module that is named whole whatever layers_to_transform says
    whole = isinstance(spec.target_modules, tuple) and any(
        "." in entry or entry == HEAD for entry in spec.target_modules
    )
    listed = isinstance(spec.target_modules, tuple) and not (whole and spec.layers_to_transform is not None)
    target = list(spec.target_modules) if listed else chosen
    tied = params is not None and is_tied(params) and any(name.startswith(f"{HEAD}.") for name in tensors)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base_model is None else str(base_model),
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.scaling == "rslora",
        "use_dora": spec.parametrization == "dora",
        "lora_dropout": spec.dropout,
        "target_modules": target,
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


def from_peft_config(raw: Mapping[str, Any], params: Any) -> tuple[LoraSpec, list[str]]:
    """A spec with the meaning of ``raw``, and what was dropped because no module has such a name.

    PEFT lets a config name modules that a model does not have, and such files are common; the tensors that come with
    the config tell what is really adapted, so a dead name loses nothing.

    Raises:
      InputError: another kind of adapter, a feature in use that a spec does not have, a missing key.
    """
    _refuse(raw)
    modules = [
        name for target in find_target_modules(params, LoraSpec(target_modules=".*")).values() for name in target.names
    ]
    dropped: list[str] = []
    spec = LoraSpec(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        target_modules=_live("target_modules", raw["target_modules"], modules, dropped),
        scaling="rslora" if raw.get("use_rslora") else "lora",
        lora_bias=bool(raw.get("lora_bias")),
        parametrization="dora" if raw.get("use_dora") else "lora",
        dropout=raw.get("lora_dropout") or 0.0,
        exclude_modules=_live("exclude_modules", raw.get("exclude_modules") or (), modules, dropped),
        layers_to_transform=_live_layers(raw.get("layers_to_transform"), modules, dropped),
        modules_to_save=_from_saved(raw.get("modules_to_save") or (), params, dropped),
        bias=_live_bias(raw.get("bias") or "none", params, dropped),
    )
    spec = _whole_names(spec, modules)
    chosen = [name for name in modules if spec.selects(name)]
    if spec.bias == "lora_only" and not any(_has_bias(params, name) for name in chosen):
        spec, dropped = replace(spec, bias="none"), [*dropped, "bias 'lora_only'"]
    patterns = {k: _live(k, raw.get(k) or {}, chosen, dropped) for k in ("rank_pattern", "alpha_pattern")}
    return replace(spec, **patterns), dropped


def _whole_names(spec: LoraSpec, modules: Sequence[str]) -> LoraSpec:
    """PEFT's rule for ``layers_to_transform``: it does not hold for a module that ``target_modules`` names whole."""
    if (
        spec.layers_to_transform is None
        or not isinstance(spec.target_modules, tuple)
        or not set(spec.target_modules) & set(modules)
    ):
        return spec
    free = replace(spec, layers_to_transform=None)
    chosen = [n for n in modules if (spec.selects(n) or n in spec.target_modules) and free.selects(n)]
    return replace(free, target_modules=tuple(chosen))


def _has_bias(params: Any, name: str) -> bool:
    path = tuple(part for part in name.split(".") if not part.isdigit())
    return tree.get_in(params, (*path, "bias")) is not None


def _refuse(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise InputError(f"peft_type {raw.get('peft_type')!r:.60} is not supported, only 'LORA'")
    for key, value in raw.items():
        neutral = not value
        if key == "init_lora_weights":
            neutral = isinstance(value, bool | str | None) and value in PLAIN_INIT
        if key == "layers_pattern":
            neutral = value in (None, [], "layers", ["layers"])  # what a spec's stack is called
        if key not in READ | INERT and not neutral:
            raise InputError(f"{key} = {value!r:.60} is a feature that is not supported")
    for key in ("target_modules", "r", "lora_alpha"):
        if raw.get(key) is None:
            raise InputError(f"the key {key} is missing")
    for key in ("use_rslora", "use_dora", "ensure_weight_tying", "lora_bias"):
        if raw.get(key) not in (None, True, False):
            raise InputError(f"{key} must be true or false, not {raw[key]!r:.60}")
    if raw.get("bias") not in (None, "none", "all", "lora_only"):
        raise InputError(f"bias must be one of none, all, lora_only, not {raw['bias']!r:.60}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(raw.get(key) or {}, Mapping):
            raise InputError(f"{key} must map patterns to numbers, not {raw[key]!r:.60}")


def _live(key: str, patterns: Any, modules: Sequence[str], dropped: list[str]) -> Any:
    if isinstance(patterns, str):
        dead = key == "exclude_modules" and not any(matches(patterns, name) for name in modules)
        dropped += [f"{key} {patterns!r:.80}"] * dead
        return () if dead else patterns
    if not isinstance(patterns, Mapping | list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise InputError(f"{key} must be names, not {patterns!r:.60}")
    there = hits(patterns, modules) if key.endswith("pattern") else suffixes(modules) & set(patterns)
    dropped += [f"{key} {p!r:.80}" for p in patterns if p not in there]
    alive = [p for p in patterns if p in there]
    return {p: patterns[p] for p in alive} if isinstance(patterns, Mapping) else alive


def _live_layers(layers: Any, modules: Sequence[str], dropped: list[str]) -> Any:
    if layers is None or layers == []:
        return None
    layers = layers if isinstance(layers, list) else [layers]
    there = {layer_number(name, ("layers",)) for name in modules}
    dropped += [
        f"layers_to_transform {shown(layer)}" for layer in layers if isinstance(layer, int) and layer not in there
    ]
    return [layer for layer in layers if not isinstance(layer, int) or layer in there]


def _live_bias(bias: Any, params: Any, dropped: list[str]) -> Any:
    """``bias``, unless the model has none: then PEFT trains none, whatever the config says."""
    if bias != "none" and not any(path[-1] == "bias" for path in flatten_dict(params)):
        dropped.append(f"bias {bias!r:.60}")
        return "none"
    return bias


def _names(params: Any) -> list[str]:
    """Every module of ``params``, containers too, by dotted name."""
    paths = {path[:-1]: leaf.shape for path, leaf in flatten_dict(params).items()}
    names: dict[str, None] = {}
    for path, shape in sorted(paths.items()):
        depth = stack_depth(path, ("layers",))
        for name in module_names(path, shape[:depth], ("layers",)):
            parts = name.split(".")
            names |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    return list(names)


def _to_saved(spec: LoraSpec, params: Any) -> list[str] | None:
    """``modules_to_save`` for PEFT, which takes any module whose name *ends with* the letters of an entry."""
    if not spec.modules_to_save:
        return None
    names = _names(params)
    stacks = {name for name in names if any(n.removeprefix(f"{name}.").isdigit() for n in names)}  # PEFT takes none
    layers = {name: name.rpartition(".")[0] for name in names if name.rpartition(".")[0] in stacks}
    ours = [n for n in names if n not in stacks and matches(spec.modules_to_save, n)]
    ours += [n for n, stack in layers.items() if matches(spec.modules_to_save, stack)]
    theirs = [name for name in names if name.endswith(spec.modules_to_save)]
    return list(spec.modules_to_save) if ours == theirs else ours


def _from_saved(entries: Any, params: Any, dropped: list[str]) -> tuple[str, ...]:
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) and entry for entry in entries):
        raise InputError(f"modules_to_save must be names, not {entries!r:.60}")
    names = _names(params)
    backwards = sorted(name[::-1] for name in names)
    alive = tuple(entry for entry in entries if _ends_one(entry, backwards))
    there = set(alive)
    dropped += [f"modules_to_save {entry!r:.80}" for entry in dict.fromkeys(entries) if entry not in there]
    theirs = [name for name in names if alive and name.endswith(alive)]
    ours = [name for name in names if matches(alive, name)]
    return alive if ours == theirs else tuple(theirs)


def _ends_one(entry: str, backwards: Sequence[str]) -> bool:
    """Whether a name, of those that are given backwards and sorted, ends with the letters of ``entry``."""
    start = entry[::-1]
    at = bisect.bisect_left(backwards, start)
    return at < len(backwards) and backwards[at].startswith(start)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
