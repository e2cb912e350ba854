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
START = ("init_weights", "d_initial", "sparse", "very_sparse")  # where training began: nothing to a trained adapter


class Tuner(NamedTuple):
    """One tuner: its parametrisation here, and its fields."""

    config: str  # its class in PEFT
    parametrization: str
    arguments: Mapping[str, Any]  # of a LoraSpec, which it fixes
    renamed: Mapping[str, str]  # to LoraConfig's
    defaults: Mapping[str, Any]  # in LoraConfig's words, where they are not LoraConfig's
    neutral: Mapping[str, tuple[Any, str]]  # what a spec means, and why nothing else
    ignored: tuple[str, ...]
    biases: str  # its word for LoraConfig's lora_only
    written: Mapping[str, Any]  # what its file says beside what a spec does
    excludes: bool = True  # whether it has exclude_modules
    of_lora: bool = False  # whether its other fields are LoraConfig's


PROJECTED = {"save_projection": True, "projection_prng_key": 0, "init_weights": True}
BEGINS = {"init_weights": (True, "an adapter starts as PEFT's default does")}
TUNERS = {
    "VERA": Tuner(
        "VeraConfig",
        "vera",
        {"scaling": "none"},
        {"r": "r", "vera_dropout": "lora_dropout"},
        {"r": 256},
        {**BEGINS, "d_initial": (0.1, "d starts at 0.1")},
        ("save_projection", "projection_prng_key"),
        "vera_only",
        {**PROJECTED, "d_initial": 0.1},
        excludes=False,
    ),
    "RANDLORA": Tuner(
        "RandLoraConfig",
        "randlora",
        {"scaling": "lora"},
        {"r": "r", "randlora_alpha": "lora_alpha", "randlora_dropout": "lora_dropout"},
        {"r": 32, "lora_alpha": 640},
        {**BEGINS, "sparse": (False, "bases are not sparse"), "very_sparse": (False, "bases are not sparse")},
        ("save_projection", "projection_prng_key"),
        "randlora_only",
        {**PROJECTED, "sparse": False, "very_sparse": False},
        excludes=False,
    ),
    "MISS": Tuner(
        "MissConfig",
        "miss",
        {"scaling": "none"},
        {"r": "r", "miss_dropout": "lora_dropout"},
        {"r": 64},
        BEGINS,
        ("mini_r",),
        "MiSS_only",
        {"init_weights": True, "mini_r": 1},
    ),
    "ADALORA": Tuner(
        "AdaLoraConfig",
        "adalora",
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
}
PEFT_TYPES = {tuner.parametrization: name for name, tuner in TUNERS.items()}


def tuner_of(peft_type: Any) -> Tuner | None:
    """The tuner of a configuration that says ``peft_type``; None of LoRA, and of those that are not here."""
    return TUNERS.get(peft_type) if isinstance(peft_type, str) else None


def lora_words(raw: Mapping[str, Any], tuner: Tuner) -> dict[str, Any]:
    """A tuner's configuration as a ``LoraConfig``: defaults filled in, what a spec does not say left out.

    Raises:
      InputError: naming the key: one that the tuner does not have, or a value that no spec means.
    """
    found = {**tuner.defaults, "peft_type": "LORA"}
    for key, value in raw.items():
        if key in tuner.neutral:
            wanted, reason = tuner.neutral[key]
            if value is not None and value != wanted:
                raise InputError(f"{key} = {value!r:.80} is not supported: {reason}")
        elif key in tuner.renamed:
            found[tuner.renamed[key]] = value
        elif key not in (*tuner.ignored, "peft_type"):
            if key not in COMMON and value and not tuner.of_lora:
                raise InputError(f"{key!r:.80} is no key of PEFT's {tuner.config} that is known here")
            found[key] = value
    if found.get("bias") == tuner.biases:
        found["bias"] = "lora_only"
    return found


def tuner_words(config: Mapping[str, Any], peft_type: str) -> dict[str, Any]:
    """The inverse of :func:`lora_words`, for a file: ``config`` is the ``LoraConfig`` that would be written."""
    tuner = TUNERS[peft_type]
    known = [key for key in COMMON if tuner.excludes or key != "exclude_modules"]
    found = {key: value for key, value in config.items() if key in known}
    found |= {theirs: config[ours] for theirs, ours in tuner.renamed.items()}
    found["bias"] = tuner.biases if config["bias"] == "lora_only" else config["bias"]
    return {"peft_type": peft_type, **found, **tuner.written}
