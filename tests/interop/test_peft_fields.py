"""Every field of PEFT's ``LoraConfig``: carried over, or refused by name; the documentation says which."""

import dataclasses
import json
import re
from enum import Enum
from typing import Any, NamedTuple

import pytest

from stablelora_jax import InputError, LoraSpec
from stablelora_jax.interop.peft_config import to_peft_config
from stablelora_jax.lora import peft_config
from stablelora_jax.lora.target_modules import find_target_modules
from tests.conftest import ROOT
from tests.helpers import tiny_decoder
from tests.interop.test_peft import SPECS, chosen

NEUTRAL, IGNORED = "default only", "ignored"
TARGET = {"target_modules": ["q_proj"]}


class Field(NamedTuple):
    """What a field is here."""

    here: str  # LoraSpec's name, or NEUTRAL or IGNORED
    value: Any  # not the default
    meaning: Any = None  # in a LoraSpec; of a neutral field, a value that is not the default and is accepted


FIELDS = {
    "r": Field("rank", 3, 3),
    "lora_alpha": Field("alpha", 5, 5),
    "lora_dropout": Field("dropout", 0.25, 0.25),
    "use_rslora": Field("scaling", True, "rslora"),
    "use_dora": Field("parametrization", True, "dora"),
    "target_modules": Field("target_modules", {"v_proj", "q_proj"}, ("q_proj", "v_proj")),
    "exclude_modules": Field("exclude_modules", {"layers.1.self_attn.q_proj"}, ("layers.1.self_attn.q_proj",)),
    "layers_to_transform": Field("layers_to_transform", [2, 0], (0, 2)),
    "rank_pattern": Field("rank_pattern", {"q_proj": 2}, (("q_proj", 2),)),
    "alpha_pattern": Field("alpha_pattern", {"q_proj": 2}, (("q_proj", 2),)),
    "modules_to_save": Field("modules_to_save", ["lm_head"], ("lm_head",)),
    "bias": Field("bias", "lora_only", "lora_only"),
    "lora_bias": Field("lora_bias", True, True),
    "init_lora_weights": Field("init", "gaussian", "gaussian"),
    "peft_type": Field(NEUTRAL, "LOHA", "LORA"),
    "task_type": Field(NEUTRAL, "SEQ_CLS", "CAUSAL_LM"),
    "fan_in_fan_out": Field(NEUTRAL, True),
    "layers_pattern": Field(NEUTRAL, "h", ["layers"]),
    "megatron_config": Field(NEUTRAL, {"tensor_model_parallel_size": 2}),
    "trainable_token_indices": Field(NEUTRAL, [1, 2]),
    "loftq_config": Field(NEUTRAL, {"loftq_bits": 4}),
    "corda_config": Field(NEUTRAL, {"corda_method": "ipm"}),
    "lora_ga_config": Field(NEUTRAL, {"direction": "ArB2r"}),
    "velora_config": Field(NEUTRAL, {"num_groups": 4}),
    "alora_invocation_tokens": Field(NEUTRAL, [5]),
    "use_qalora": Field(NEUTRAL, True),
    "monteclora_config": Field(NEUTRAL, {"num_samples": 8}),
    "layer_replication": Field(NEUTRAL, [[0, 2], [1, 3]]),
    "target_parameters": Field("target_modules", ["experts.gate_up_proj"], ("experts.gate_up_proj", "q_proj")),
    "use_bdlora": Field(NEUTRAL, {"nblocks": 2}),
    "arrow_config": Field(NEUTRAL, {"top_k": 3}),
    "kasa_config": Field(NEUTRAL, {"beta": 0.1}),
    "ensure_weight_tying": Field(IGNORED, True),
    "inference_mode": Field(IGNORED, True),
    "base_model_name_or_path": Field(IGNORED, "org/name"),
    "revision": Field(IGNORED, "main"),
    "auto_mapping": Field(IGNORED, {"base_model_class": "Net"}),
    "peft_version": Field(IGNORED, "0.1.0"),
    "runtime_config": Field(IGNORED, {"ephemeral_gpu_offload": True}),
    "eva_config": Field(IGNORED, {"rho": 1.0}),
    "megatron_core": Field(IGNORED, "own.core"),
    "qalora_group_size": Field(IGNORED, 32),
}
CARRIED = [name for name, field in FIELDS.items() if field.here not in (NEUTRAL, IGNORED)]
PEFT_DEFAULTS = LoraSpec(rank=8, alpha=8, target_modules=["q_proj"])


def test_the_fields_are_those_of_peft():
    peft = pytest.importorskip("peft")
    assert set(FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}
    config = peft.LoraConfig(**TARGET, task_type="CAUSAL_LM").to_dict()
    assert isinstance(config["peft_type"], Enum) and isinstance(config["target_modules"], set)
    assert LoraSpec.from_peft(config) == LoraSpec.from_peft(TARGET) == PEFT_DEFAULTS
    for name, field in FIELDS.items():
        if name != "target_modules":
            assert config.get(name) != field.value, "the table's values are not defaults"


def test_the_documentation_says_the_same():
    text = (ROOT / "docs" / "coming-from-peft.md").read_text().split("## Every field")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE)
    tables = [*peft_config.SAME, *peft_config.RENAMED, *peft_config.IGNORED, *peft_config.NEUTRAL]
    tables += peft_config.JOINED
    assert sorted(tables) == sorted(FIELDS), "each field is in one table"
    assert [(name, here.strip("`")) for name, here in rows] == [(name, field.here) for name, field in FIELDS.items()]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_carried_over_or_refused_by_name(name):
    field = FIELDS[name]
    config = {**TARGET, name: field.value}
    if field.here == NEUTRAL:
        with pytest.raises(InputError, match=rf"^{name} = .* is not supported: \w") as error:
            LoraSpec.from_peft(config)
        assert "\n" not in str(error.value) and len(str(error.value)) < 250
        assert LoraSpec.from_peft({**TARGET, name: field.meaning}) == PEFT_DEFAULTS
    elif field.here == IGNORED:
        assert LoraSpec.from_peft(config) == PEFT_DEFAULTS
    else:
        assert LoraSpec.from_peft(config) == dataclasses.replace(PEFT_DEFAULTS, **{field.here: field.meaning})
        assert getattr(PEFT_DEFAULTS, field.here) != field.meaning


@pytest.mark.parametrize("name", CARRIED)
def test_peft_writes_what_is_read(name, tmp_path):
    peft = pytest.importorskip("peft")
    value = FIELDS[name].value
    config = peft.LoraConfig(**{**TARGET, name: list(value) if isinstance(value, set) else value})
    expected = LoraSpec.from_peft({**TARGET, name: value})
    assert LoraSpec.from_peft(config.to_dict()) == expected
    config.save_pretrained(tmp_path)
    assert LoraSpec.from_peft(tmp_path) == LoraSpec.from_peft(str(tmp_path)) == expected


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(name):
    """A spec that names modules by their endings comes back; others come back as the modules that they select."""
    spec, tied = SPECS[name], name.startswith("tied")
    _, params = tiny_decoder(qkv_bias=True, o_bias=True, tie_word_embeddings=tied)
    config = to_peft_config(spec, find_target_modules(params, spec).values(), "org/name", params, [])
    found = LoraSpec.from_peft(json.loads(json.dumps(config)))
    if isinstance(spec.target_modules, tuple) and name != "saved":  # "norm" is written as the modules called so
        assert found == spec
    assert {n: (found.rank_of(n), found.scale_of(n)) for n in chosen(found, params)} == {
        n: (spec.rank_of(n), spec.scale_of(n)) for n in chosen(spec, params)
    }


def test_values_that_mean_the_default():
    config = {**TARGET, "layers_to_transform": [], "rank_pattern": None, "bias": None, "lora_dropout": None}
    assert LoraSpec.from_peft({**config, "modules_to_save": [], "feature_of_tomorrow": None}) == PEFT_DEFAULTS
    assert LoraSpec.from_peft({"target_modules": "ALL-LINEAR"}).target_modules == "all-linear"
    assert LoraSpec.from_peft({**TARGET, "layers_to_transform": 1}).layers_to_transform == (1,)


def test_the_head_of_a_task_is_named():
    given = {**TARGET, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    assert LoraSpec.from_peft(given).modules_to_save == ("classifier", "score")


class Config:
    """Something with a ``to_dict``, as a ``LoraConfig`` has."""

    def to_dict(self):
        return TARGET


BAD = {
    "no mapping": (3, "a PEFT config must be a mapping or a directory with adapter_config.json, not 3"),
    "a LoraConfig": (Config(), "not Config: give its to_dict()"),
    "no directory": ("no/where", "no/where/adapter_config.json does not exist: no/where is not a PEFT adapter"),
    "no path": ("", "the adapter's directory is empty"),
    "no target": ({"r": 4}, "target_modules is missing: PEFT would choose by the type of the model"),
    "empty target": ({"target_modules": []}, "target_modules is empty"),
    "misspelt": ({**TARGET, "lora_alhpa": 4}, "'lora_alhpa' is no key of PEFT's LoraConfig"),
    "misspelt, close": ({**TARGET, "lora_alhpa": 4}, "is it lora_alpha?"),
    "our name": ({**TARGET, "rank": 4}, "is it r?"),
    "not text": ({**TARGET, 4: 4}, "4 is no key of PEFT's LoraConfig"),
    "rank": ({**TARGET, "r": 0}, "r: rank must be a whole number of at least 1, not 0"),
    "no rank": ({**TARGET, "r": None}, "r: rank must be a whole number"),
    "alpha": ({**TARGET, "lora_alpha": "x"}, "lora_alpha: alpha must be a positive number, not 'x'"),
    "dropout": ({**TARGET, "lora_dropout": 1.5}, "lora_dropout: dropout must be in [0, 1), not 1.5"),
    "flag": ({**TARGET, "use_dora": "yes"}, "use_dora must be true or false, not 'yes'"),
    "long flag": ({**TARGET, "use_dora": 10**5000}, "use_dora must be true or false, not a number of very many"),
    "bias": ({**TARGET, "bias": "some"}, "bias must be one of none, all, lora_only, not 'some'"),
    "table": ({**TARGET, "rank_pattern": [1]}, "rank_pattern must map patterns to numbers, not [1]"),
    "table of numbers": ({**TARGET, "alpha_pattern": {1: 2}}, "alpha_pattern must map patterns to numbers"),
    "rank of a pattern": ({**TARGET, "rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] must be a whole number"),
    "names": ({"target_modules": [1]}, "target_modules must be names, not [1]"),
    "one name": ({**TARGET, "modules_to_save": "lm_head"}, "modules_to_save must be names, not 'lm_head'"),
    "an empty name": ({**TARGET, "modules_to_save": [""]}, "modules_to_save must be names, not ['']"),
    "layers": ({**TARGET, "layers_to_transform": ["1"]}, "layers_to_transform must be whole numbers"),
    "expression": ({"target_modules": "(q"}, "not a valid regular expression"),
    "layers and an expression": (
        {"target_modules": ".*q_proj", "layers_to_transform": [1]},
        "layers_to_transform needs target_modules as a list",
    ),
    "layers and a whole name": (
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
        "layers_to_transform does not hold in PEFT for 'lm_head', which target_modules names whole",
    ),
    "layers and a layer": (
        {"target_modules": ["layers.1.mlp.up_proj"], "layers_to_transform": [1]},
        "for 'layers.1.mlp.up_proj', which target_modules names whole",
    ),
    "task": ({**TARGET, "task_type": "TOKEN_CLS"}, "add it to modules_to_save"),
    "start": ({**TARGET, "init_lora_weights": "corda"}, "init_lora_weights = 'corda' is not supported"),
    "no start": ({**TARGET, "init_lora_weights": False}, "an init is true or one of gaussian, orthogonal, olora"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case):
    config, message = BAD[case]
    with pytest.raises(InputError, match=re.escape(message)) as error:
        LoraSpec.from_peft(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "text,message",
    [("{", "is not readable JSON"), ("[]", "must hold a JSON object"), ('{"r": 0}', "target_modules is missing")],
)
def test_mistakes_of_a_file_name_it(text, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        LoraSpec.from_peft(tmp_path)
    assert str(tmp_path / "adapter_config.json") in str(error.value) and "\n" not in str(error.value)
