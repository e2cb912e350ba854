"""PEFT's ``LoraConfig`` as the arguments of a :class:`~stablelora_jax.lora.spec.LoraSpec`; no model is needed.

Every field of ``LoraConfig`` (PEFT 0.21) is in one of the four tables below, which ``docs/coming-from-peft.md`` shows;
:mod:`.peft_tuners` puts the configurations of other tuners into its words.
:mod:`stablelora_jax.interop.peft_config` resolves the names against a model, when an adapter is loaded.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from stablelora_jax.lora.initializers import INITIALIZERS
from stablelora_jax.lora.peft_tuners import PEFT_TYPES, form_of, lora_words
from stablelora_jax.lora.spec import HEADS, LoraSpec, shown
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, read_json_object

CONFIG = "adapter_config.json"

SAME = """target_modules exclude_modules layers_to_transform rank_pattern alpha_pattern modules_to_save bias
    lora_bias""".split()
RENAMED = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "scaling",
    "use_dora": "parametrization",
    "init_lora_weights": "init",
}
# Neither what an adapter computes nor its shapes depend on these.
IGNORED = """peft_version auto_mapping base_model_name_or_path revision inference_mode runtime_config eva_config
    megatron_core qalora_group_size ensure_weight_tying""".split()
JOINED = ("target_parameters",)  # with target_modules: a spec names modules and leaves alike
# Accepted where they change nothing, and refused otherwise with the reason.
NEUTRAL = {
    "peft_type": f"a spec is one of LORA, {', '.join(PEFT_TYPES)}; load_peft reads files of LOHA and LOKR too",
    "task_type": "PEFT trains the head of this task in full: add it to modules_to_save",
    "fan_in_fan_out": "every kernel here is (in, out)",
    "layers_pattern": "the stack of layers is called layers here; LoraSpec's stacked names another",
    "megatron_config": "there are no Megatron layers here; a mesh shards kernels and adapters",
    "trainable_token_indices": "rows of an embedding cannot be trained alone: adapt embed_tokens, or save it whole",
    "loftq_config": "PEFT's LoftQ starts from another base: say init='loftq' of the spec",
    "corda_config": "CorDA starts from another base",
    "lora_ga_config": "PEFT's LoRA-GA starts from another base: say init='lora_ga' of the spec",
    "velora_config": "VeLoRA's compressed backward pass is not implemented",
    "alora_invocation_tokens": "an adapter here acts on all tokens",
    "use_qalora": "QALoRA is not implemented",
    "monteclora_config": "MonteCLoRA is not implemented",
    "layer_replication": "layers cannot be repeated",
    "use_bdlora": "block-diagonal factors are not implemented",
    "arrow_config": "Arrow routing is not implemented; a bank holds many adapters",
    "kasa_config": "KaSA is not implemented",
}
# Of init_lora_weights, what is an ``init`` of the same name; True, PEFT's default, is kaiming.
INITS = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "eva", "corda", "loftq", "lora_ga", "mica")
TASK_HEADS = {  # what PEFT adds to modules_to_save for a task (peft_model.py)
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def from_peft(config: Mapping[str, Any] | str | os.PathLike[str]) -> LoraSpec:
    """The spec with the meaning of ``config``; see :meth:`stablelora_jax.lora.spec.LoraSpec.from_peft`."""
    if isinstance(config, str | os.PathLike):
        directory = as_path(config, "the adapter's directory")
        raw = read_config(directory)
        try:
            return from_peft(raw)
        except InputError as error:
            raise InputError(f"{directory / CONFIG}: {error}") from None
    if not isinstance(config, Mapping):
        hint = f"{type(config).__name__}: give its to_dict()" if hasattr(config, "to_dict") else shown(config)
        raise InputError(f"a PEFT config must be a mapping or a directory with {CONFIG}, not {hint}")
    arguments = spec_arguments(config)
    _require_layers(arguments)
    return make_spec(arguments)


def spec_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``LoraSpec`` with the meaning of a PEFT config; an absent key has PEFT's default.

    Raises:
      InputError: naming the key: an unknown one, a feature that a spec does not have, or a value of another kind.

    Example::

        >>> found = spec_arguments({"r": 4, "target_modules": {"v_proj", "q_proj"}, "use_rslora": True})
        >>> found["rank"], found["alpha"], found["target_modules"], found["scaling"]
        (4, 8, ['q_proj', 'v_proj'], 'rslora')
    """
    raw = {key: _plain(value) for key, value in config.items()}
    form = form_of(raw)
    raw, fixed = (raw, {}) if form is None else lora_words(raw, form)
    _require_neutral(raw)
    _require_kinds(raw)
    layers = raw.get("layers_to_transform")
    return {
        "rank": raw.get("r", 8),
        "alpha": raw.get("lora_alpha", 8),
        "dropout": raw.get("lora_dropout") or 0.0,
        "scaling": "rslora" if raw.get("use_rslora") else "lora",
        "parametrization": "dora" if raw.get("use_dora") else "lora",
        "target_modules": _targets(raw),
        "exclude_modules": raw.get("exclude_modules") or (),
        "layers_to_transform": None if layers == [] else layers,
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
        "modules_to_save": raw.get("modules_to_save") or (),
        "bias": raw.get("bias") or "none",
        "lora_bias": bool(raw.get("lora_bias")),
        "init": _init(raw.get("init_lora_weights")),
        **fixed,
    }


def make_spec(arguments: Mapping[str, Any]) -> LoraSpec:
    """``LoraSpec(**arguments)``, whose error names the key as PEFT does."""
    try:
        return LoraSpec(**arguments)
    except InputError as error:
        name = {ours: theirs for theirs, ours in RENAMED.items()}.get(str(error).split(" ")[0])
        raise InputError(f"{name}: {error}" if name else str(error)) from None


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Raises:
      InputError: there is none, or it is damaged.
    """
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory / CONFIG} does not exist: {directory} is not a PEFT adapter")
    return read_json_object(directory / CONFIG)


def _plain(value: Any) -> Any:
    """An enum's value, and a set as a sorted list: what ``adapter_config.json`` has for them."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value, key=str) if isinstance(value, set | frozenset) else value


def _require_neutral(raw: Mapping[Any, Any]) -> None:
    known = [*SAME, *RENAMED, *IGNORED, *NEUTRAL, *JOINED]
    for key, value in raw.items():
        if key in NEUTRAL and not _is_neutral(key, value, raw):
            raise InputError(f"{key} = {shown(value)} is not supported: {NEUTRAL[key]}")
        if key not in known and value:
            raise InputError(f"{shown(key)} is no key of PEFT's LoraConfig that is known here{_hint(key, known)}")


def _is_neutral(key: str, value: Any, raw: Mapping[Any, Any]) -> bool:
    if key == "peft_type":
        return value in (None, "LORA")
    if key == "task_type":
        saved = raw.get("modules_to_save") or ()
        return not isinstance(value, str) or all(head in saved for head in TASK_HEADS.get(value, ()))
    return not value or (key == "layers_pattern" and value in ("layers", ["layers"]))


def _init(value: Any) -> str:
    if value is None or value is True:
        return "kaiming"
    if isinstance(value, str) and value in INITS and value in INITIALIZERS:
        return value
    known = ", ".join(name for name in INITS if name in INITIALIZERS)
    raise InputError(f"init_lora_weights = {shown(value)} is not supported: an init is true or one of {known}")


def _targets(raw: Mapping[Any, Any]) -> Any:
    """PEFT's ``target_modules`` and ``target_parameters``: a spec names modules and leaves alike."""
    modules, parameters = raw.get("target_modules"), raw.get("target_parameters")
    if not parameters:
        return modules
    if not isinstance(parameters, list | tuple) or isinstance(modules, str):
        raise InputError("target_parameters must be a list, and target_modules beside it too")
    return [*(modules or ()), *parameters]


def _hint(key: Any, known: list[str]) -> str:
    theirs = {ours: name for name, ours in RENAMED.items()}
    close = [theirs[key]] if key in theirs else difflib.get_close_matches(str(key)[:80], known, n=1)
    return f": is it {close[0]}?" if close else ""


def _require_kinds(raw: Mapping[Any, Any]) -> None:
    if raw.get("target_modules") is None and not raw.get("target_parameters"):
        raise InputError(
            "target_modules is missing: PEFT would choose by the type of the model, for most decoders q_proj and "
            "v_proj; name modules, or say all-linear"
        )
    for key in ("use_rslora", "use_dora", "ensure_weight_tying", "lora_bias"):
        if raw.get(key) not in (None, True, False):
            raise InputError(f"{key} must be true or false, not {shown(raw[key])}")
    if raw.get("bias") not in (None, "none", "all", "lora_only"):
        raise InputError(f"bias must be one of none, all, lora_only, not {shown(raw['bias'])}")
    for key in ("rank_pattern", "alpha_pattern"):
        table = raw.get(key) or {}
        if not isinstance(table, Mapping) or not all(isinstance(pattern, str) for pattern in table):
            raise InputError(f"{key} must map patterns to numbers, not {shown(raw[key])}")
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if not _are_names(raw.get(key) or (), key):
            raise InputError(f"{key} must be names, not {shown(raw[key])}")
    if isinstance(raw.get("target_modules"), str) and raw.get("layers_to_transform") not in (None, []):
        raise InputError("layers_to_transform needs target_modules as a list: PEFT refuses it beside a string")


def _are_names(value: Any, key: str) -> bool:
    if isinstance(value, str):
        return key != "modules_to_save"
    saved = key == "modules_to_save"  # PEFT compares letters: an empty name would be every module's ending
    return isinstance(value, list | tuple) and all(isinstance(name, str) and (name or not saved) for name in value)


def _require_layers(arguments: Mapping[str, Any]) -> None:
    """Refuse ``layers_to_transform`` beside the whole name of a module, for which it does not hold in PEFT."""
    if arguments["layers_to_transform"] is None:
        return
    for name in arguments["target_modules"]:
        if name in HEADS or name.startswith("model.") or any(part.isdigit() for part in name.split(".")):
            raise InputError(
                f"layers_to_transform does not hold in PEFT for {shown(name)}, which target_modules names whole: "
                "leave one out, or list the modules without layers_to_transform"
            )
