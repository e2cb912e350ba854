"""The configurations of PEFT's other tuners (0.21), in the words of its ``LoraConfig`` and back.

A tuner here is one whose adapters are a parametrisation of ours. Its fields are in one of the tables of its row:
``renamed`` to the field of ``LoraConfig`` with that meaning, ``neutral``, which have to say what a spec has, and
``ignored``, which change nothing that an adapter computes; :data:`COMMON` ones are of the same name in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from stablelora_jax.utils.errors import InputError

COMMON = """task_type target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias
    fan_in_fan_out inference_mode base_model_name_or_path revision auto_mapping peft_version""".split()
# Where training began, which is nothing to a trained adapter.
START = """init_weights d_initial sparse very_sparse mask_type init_vector_bank_bound init_logits_std""".split()


class Tuner(NamedTuple):
    """One tuner, or one of its modes: its fields, and those of a LoraSpec."""

    peft_type: str
    config: str  # its class in PEFT
    arguments: Mapping[str, Any]  # of a LoraSpec, which it fixes
    renamed: Mapping[str, str]  # to LoraConfig's
    defaults: Mapping[str, Any]  # in LoraConfig's words, where they are not LoraConfig's
    neutral: Mapping[str, tuple[Any, str]]  # what a spec means, and why nothing else
    ignored: tuple[str, ...]
    biases: str  # its word for LoraConfig's lora_only
    written: Mapping[str, Any]  # what its file says beside what a spec does
    options: Mapping[str, tuple[str, int]] = {}  # a spec's option for a field, and its default in PEFT
    lacks: tuple[str, ...] = ()  # of COMMON
    of_lora: bool = False  # whether its other fields are LoraConfig's


PROJECTED = {"save_projection": True, "projection_prng_key": 0, "init_weights": True}
BEGINS = {"init_weights": (True, "an adapter starts as PEFT's default does")}
TUNERS = {  # by parametrisation
    "vera": Tuner(
        "VERA",
        "VeraConfig",
        {"scaling": "none"},
        {"r": "r", "vera_dropout": "lora_dropout"},
        {"r": 256},
        {**BEGINS, "d_initial": (0.1, "d starts at 0.1")},
        ("save_projection", "projection_prng_key"),
        "vera_only",
        {**PROJECTED, "d_initial": 0.1},
        lacks=("exclude_modules",),
    ),
    "randlora": Tuner(
        "RANDLORA",
        "RandLoraConfig",
        {"scaling": "lora"},
        {"r": "r", "randlora_alpha": "lora_alpha", "randlora_dropout": "lora_dropout"},
        {"r": 32, "lora_alpha": 640},
        {**BEGINS, "sparse": (False, "bases are not sparse"), "very_sparse": (False, "bases are not sparse")},
        ("save_projection", "projection_prng_key"),
        "randlora_only",
        {**PROJECTED, "sparse": False, "very_sparse": False},
        lacks=("exclude_modules",),
    ),
    "miss": Tuner(
        "MISS",
        "MissConfig",
        {"scaling": "none"},
        {"r": "r", "miss_dropout": "lora_dropout"},
        {"r": 64},
        BEGINS,
        ("mini_r",),
        "MiSS_only",
        {"init_weights": True, "mini_r": 1},
        lacks=("fan_in_fan_out",),
    ),
    "miss_mini": Tuner(
        "MISS",
        "MissConfig",
        {"scaling": "none"},
        {"r": "r", "miss_dropout": "lora_dropout"},
        {"r": 64},
        {"init_weights": ("mini", "")},
        (),
        "MiSS_only",
        {"init_weights": "mini"},
        options={"mini_r": ("mini_r", 1)},
        lacks=("fan_in_fan_out",),
    ),
    "bat": Tuner(
        "MISS",
        "MissConfig",
        {"scaling": "none"},
        {"r": "r", "miss_dropout": "lora_dropout"},
        {"r": 64},
        {"init_weights": ("bat", "")},
        ("mini_r",),
        "MiSS_only",
        {"init_weights": "bat", "mini_r": 1},
        lacks=("fan_in_fan_out",),
    ),
    "adalora": Tuner(
        "ADALORA",
        "AdaLoraConfig",
        {"scaling": "lora", "init": "init_ab"},
        {"init_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
        {"r": 12},
        {"use_dora": (False, "AdaLoRA has no magnitudes")},
        tuple(
            "r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step rank_pattern alpha_pattern "
            "use_rslora init_lora_weights".split()
        ),
        "lora_only",
        {"total_step": 1, "tinit": 0, "tfinal": 0},  # PEFT makes no AdaLoRA without a schedule
        of_lora=True,
    ),
    "shira": Tuner(
        "SHIRA",
        "ShiraConfig",
        {"scaling": "none"},
        {"r": "r"},
        {"r": 32},
        {**BEGINS, "mask_type": ("random", "entries are drawn uniformly")},
        ("random_seed",),
        "lora_only",
        {"init_weights": True, "mask_type": "random"},
        lacks=("exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    ),
    "vblora": Tuner(
        "VBLORA",
        "VBLoRAConfig",
        {"scaling": "none"},
        {"r": "r", "vblora_dropout": "lora_dropout"},
        {"r": 4},
        {
            "save_only_topk_weights": (False, "adapters have all logits"),
            "init_vector_bank_bound": (0.02, "the bank starts within 0.02"),
            "init_logits_std": (0.1, "logits start with a deviation of 0.1"),
        },
        (),
        "vblora_only",
        {"save_only_topk_weights": False},
        options={"num_vectors": ("vectors", 256), "vector_length": ("length", 256), "topk": ("topk", 2)},
    ),
}
PEFT_TYPES = tuple(dict.fromkeys(tuner.peft_type for tuner in TUNERS.values()))


def form_of(raw: Mapping[str, Any]) -> str | None:
    """The parametrisation of a configuration of one of :data:`TUNERS`; None of LoRA, and of those that are not here."""
    if raw.get("peft_type") == "MISS":
        return {"mini": "miss_mini", "bat": "bat"}.get(str(raw.get("init_weights")), "miss")
    return next((form for form, tuner in TUNERS.items() if tuner.peft_type == raw.get("peft_type")), None)


def lora_words(raw: Mapping[str, Any], form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tuner's configuration as a ``LoraConfig``, defaults filled in, and the arguments of a spec that it has not.

    Raises:
      InputError: naming the key: one that the tuner does not have, or a value that no spec means.
    """
    tuner = TUNERS[form]
    found, options = {**tuner.defaults, "peft_type": "LORA"}, dict(tuner.options.values())
    for key, value in raw.items():
        if key in tuner.neutral:
            wanted, reason = tuner.neutral[key]
            if value is not None and value != wanted:
                raise InputError(f"{key} = {value!r:.80} is not supported: {reason}")
        elif key in tuner.renamed:
            found[tuner.renamed[key]] = value
        elif key in tuner.options:
            options[tuner.options[key][0]] = value
        elif key not in (*tuner.ignored, "peft_type"):
            if key not in COMMON and value and not tuner.of_lora:
                raise InputError(f"{key!r:.80} is no key of PEFT's {tuner.config} that is known here")
            found[key] = value
    if found.get("bias") == tuner.biases:
        found["bias"] = "lora_only"
    return found, {"parametrization": form, **tuner.arguments, "options": options}


def tuner_words(config: Mapping[str, Any], form: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`lora_words`, for a file: ``config`` is the ``LoraConfig`` that would be written.

    Args:
      config: in the words of ``LoraConfig``.
      form: the parametrisation.
      options: of the spec, all of them.
    """
    tuner = TUNERS[form]
    found = {key: value for key, value in config.items() if key in COMMON}
    found |= {theirs: config[ours] for theirs, ours in tuner.renamed.items()}
    found |= {theirs: options[ours] for theirs, (ours, _) in tuner.options.items()}
    found["bias"] = tuner.biases if config["bias"] == "lora_only" else config["bias"]
    known = {key: value for key, value in found.items() if key not in tuner.lacks}
    return {"peft_type": tuner.peft_type, **known, **tuner.written}
