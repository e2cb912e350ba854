"""``LoraSpec`` <-> PEFT's ``adapter_config.json``. A PEFT feature that a spec cannot express is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stablelora_jax import tree
from stablelora_jax.adapter import LoraSpec, Site
from stablelora_jax.errors import InputError

READ = frozenset(
    """r lora_alpha target_modules use_rslora lora_dropout exclude_modules layers_to_transform rank_pattern
    alpha_pattern""".split()
)
# Neither the function of a loaded adapter nor its shapes depend on these.
INERT = frozenset(
    """peft_type peft_version task_type base_model_name_or_path revision inference_mode auto_mapping
    megatron_core runtime_config ensure_weight_tying qalora_group_size""".split()
)
# Initialisations that leave the base as it is; others (pissa, olora, loftq, ...) need the base they started from.
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


def to_peft_config(spec: LoraSpec, sites: Iterable[Site], base_model: str | None) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for adapters at ``sites``.

    Lists and pattern maps are written as they are, since they mean the same in PEFT; ``all-linear`` and regular
    expressions are written as the modules they stand for: PEFT would match an expression with containers too, which
    have no weights, and vLLM wants a list. Keys of pattern maps keep their order, which is meaning where two match one
    module (PEFT's own writer sorts them).
    """
    chosen = [name for site in sites for name, rank in zip(site.names, site.ranks, strict=True) if rank]
    listed = isinstance(spec.target, tuple)
    target = list(spec.target) if listed else chosen
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.scaling == "rslora",
        "lora_dropout": spec.dropout,
        "target_modules": target,
        "exclude_modules": _plain(spec.exclude) if listed and spec.exclude else None,
        "layers_to_transform": list(spec.layers) if listed and spec.layers is not None else None,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def from_peft_config(raw: Mapping[str, Any], modules: Sequence[str], source: str) -> tuple[LoraSpec, list[str]]:
    """A spec with the meaning of ``raw``, and the patterns dropped because no module has such a name.

    PEFT lets a list name modules that a model does not have, and such files are common; the tensors that come with
    the config tell what is really adapted, so a dead pattern loses nothing.

    Raises:
      InputError: another kind of adapter, a feature in use that plain LoRA and rsLoRA do not have, a missing key.
    """
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{source}: peft_type {raw.get('peft_type')!r} is not supported, only 'LORA'")
    for key, value in raw.items():
        neutral = not value or (key == "bias" and value == "none")
        if key == "init_lora_weights":
            neutral = value in PLAIN_INIT
        if key not in READ | INERT and not neutral:
            raise InputError(f"{source}: {key} = {value!r} is a feature that is not supported")
    for key in ("target_modules", "r", "lora_alpha"):
        if raw.get(key) is None:
            raise InputError(f"{source}: the key {key} is missing")
    dropped: list[str] = []
    layers = raw.get("layers_to_transform")
    try:
        spec = LoraSpec(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            target=_live("target_modules", raw["target_modules"], modules, dropped),
            scaling="rslora" if raw.get("use_rslora") else "lora",
            dropout=raw.get("lora_dropout") or 0.0,
            exclude=_live("exclude_modules", raw.get("exclude_modules") or (), modules, dropped),
            layers=None if layers is None or layers == [] else layers,
        )
        chosen = [name for name in modules if spec.selects(name)]
        patterns = {k: _live(k, raw.get(k) or {}, chosen, dropped) for k in ("rank_pattern", "alpha_pattern")}
        return replace(spec, **patterns), dropped
    except (InputError, TypeError) as error:
        raise InputError(f"{source}: {error}") from None


def _live(key: str, patterns: Any, modules: Sequence[str], dropped: list[str]) -> Any:
    if isinstance(patterns, str):
        return patterns
    rule = tree.pattern_matches if key.endswith("pattern") else lambda pattern, name: tree.matches((pattern,), name)
    alive = [p for p in patterns if any(rule(p, name) for name in modules)]
    dropped += [f"{key} {p!r}" for p in patterns if p not in alive]
    return {p: patterns[p] for p in alive} if isinstance(patterns, Mapping) else alive


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
