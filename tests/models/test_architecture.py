"""config.json: both styles, defaults, and refusal by name."""

import json

import pytest

from stablelora_jax import InputError
from stablelora_jax.models.architecture import Rope, decoder_config, to_hf

LLAMA = dict(
    model_type="llama", vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
)
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 6}
MISTRAL = {**QWEN2, "model_type": "mistral"}
FULL, SLIDING = "full_attention", "sliding_attention"
ON = {"use_sliding_window": True, "sliding_window": 7}
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@pytest.mark.parametrize(
    "extra,rope",
    [
        ({}, Rope()),
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(10000.0, "linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Rope(5e5, "llama3", 8.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Rope(7.0)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}}, Rope(7.0, "linear", 2.0)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, Rope(5e5, "llama3", 8.0)),
    ],
)
def test_both_styles_of_rope(extra, rope):
    assert decoder_config({**LLAMA, **extra}).rope == rope


def test_biases_and_heads():
    plain, biased, qwen = (
        decoder_config(c) for c in (LLAMA, {**LLAMA, "attention_bias": True, "mlp_bias": True}, QWEN2)
    )
    assert (plain.qkv_bias, plain.o_bias, plain.mlp_bias) == (False, False, False)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    assert (qwen.qkv_bias, qwen.o_bias, qwen.mlp_bias) == (True, False, False)
    assert plain.num_key_value_heads == 4 and plain.head_dim == 4 and qwen.num_key_value_heads == 2
    assert decoder_config({**LLAMA, "head_dim": 6}).head_dim == 6
    assert decoder_config({**LLAMA, "eos_token_id": [1, 2]}).eos_token_id == (1, 2)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "16"}, "hidden_size must be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 3.5}, "vocab_size"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"hidden_size": 18}, "not a multiple of 4 attention heads"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"a_feature_of_tomorrow": 1}, "a_feature_of_tomorrow"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}}, "beta_fast"),
        ({"rope_scaling": "linear"}, "must be a mapping"),
        ({"is_causal": False}, "is_causal"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "keep one"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_theta": "x"}, "rope_theta"),
        ({"layer_types": 3}, "layer_types"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope type"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
    ],
)
def test_refused_by_name(change, message):
    with pytest.raises(InputError, match=message) as error:
        decoder_config({**LLAMA, **change}, "some/config.json")
    assert str(error.value).startswith("some/config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 5},
        {"layer_types": ["full_attention"] * 2},
        {"partial_rotary_factor": 1.0},
        {"final_logit_softcapping": None},
        {"pretraining_tp": 1},
    ],
)
def test_features_that_are_off_are_fine(change):
    assert decoder_config({**QWEN2, **change}) == decoder_config(QWEN2)


@pytest.mark.parametrize(
    "raw,windows",
    [
        (MISTRAL, (4096, 4096)),
        ({**MISTRAL, "sliding_window": None}, ()),
        ({**MISTRAL, "sliding_window": 7, "layer_types": [SLIDING] * 2}, (7, 7)),
        ({**MISTRAL, "sliding_window": None, "layer_types": [FULL] * 2, "use_sliding_window": False}, ()),
        (QWEN2, ()),
        ({**QWEN3, "sliding_window": 7}, ()),
        ({**QWEN2, **ON}, ()),  # from layer 28 on
        ({**QWEN2, **ON, "max_window_layers": 0}, (7, 7)),
        ({**QWEN3, **ON, "max_window_layers": 1}, (0, 7)),
        ({**QWEN3, **ON, "max_window_layers": 2}, ()),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 1}, (0, 4096)),
        ({**QWEN2, **ON, "sliding_window": None, "max_window_layers": 0}, ()),
        ({**QWEN2, **ON, "max_window_layers": 0, "layer_types": [SLIDING, FULL]}, (7, 0)),
        ({**QWEN2, **ON, "layer_types": None, "max_window_layers": 1}, (0, 7)),
        ({**QWEN2, **ON, "layer_types": [FULL, FULL], "max_window_layers": 0}, ()),
    ],
)
def test_windows(raw, windows):
    config = decoder_config(raw)
    assert config.windows == windows
    assert decoder_config(json.loads(json.dumps(to_hf(config)))) == config


@pytest.mark.parametrize(
    "raw,message",
    [
        ({**MISTRAL, "sliding_window": 0}, "sliding_window must be a positive whole number"),
        ({**MISTRAL, "sliding_window": "x"}, "sliding_window must be a positive whole number"),
        ({**MISTRAL, "layer_types": [SLIDING, FULL]}, "layer_types contradict sliding_window 4096"),
        ({**MISTRAL, "use_sliding_window": False}, "use_sliding_window False contradicts"),
        ({**MISTRAL, "sliding_window": None, "use_sliding_window": True}, "use_sliding_window True contradicts"),
        ({**QWEN2, "layer_types": [SLIDING, FULL]}, "no sliding_window in use"),
        ({**QWEN2, **ON, "layer_types": [SLIDING]}, "layer_types has 1 entries for num_hidden_layers 2"),
        ({**QWEN2, **ON, "layer_types": [SLIDING, "chunked_attention"]}, "layer_types must be a list"),
        ({**QWEN3, **ON, "max_window_layers": -1}, "max_window_layers"),
        ({**QWEN3, "use_sliding_window": 1}, "use_sliding_window must be true or false"),
        ({**LLAMA, "use_sliding_window": True}, "use_sliding_window"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias"),
        ({**QWEN3, "mlp_bias": True}, "mlp_bias"),
        ({**QWEN3, "head_dim": None}, "head_dim is missing"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is absurd"),
        ({**LLAMA, "head_dim": 10**7}, "head_dim 10000000 is absurd"),
        ({**LLAMA, "vocab_size": 10**12}, "vocab_size 1000000000000 is absurd"),
    ],
)
def test_refused_in_some_families(raw, message):
    with pytest.raises(InputError, match=message) as error:
        decoder_config(raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_keys_mean_what_they_mean_to_transformers(family):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=31, hidden_size=256, intermediate_size=24, num_hidden_layers=40, num_attention_heads=32)
    ours, theirs = decoder_config({"model_type": family, **sizes}), transformers.AutoConfig.for_model(family, **sizes)
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    for name in ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "bos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.eos_token_id == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.windows == (() if getattr(theirs, "sliding_window", None) is None else (theirs.sliding_window,) * 40)
    assert (ours.qkv_bias, ours.o_bias, ours.mlp_bias) == (family == "qwen2", False, False)


def test_families_differ_in_their_parts():
    assert decoder_config(QWEN3).qk_norm and decoder_config(QWEN3).head_dim == 6
    assert not any(decoder_config(raw).qk_norm for raw in (LLAMA, QWEN2, MISTRAL))
    biased = decoder_config({**QWEN3, "attention_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, False)
    assert decoder_config({**MISTRAL, "num_key_value_heads": None}).num_key_value_heads == 4


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA,
        QWEN2,
        QWEN3,
        MISTRAL,
        {**QWEN3, "attention_bias": True},
        {**LLAMA, "attention_bias": True, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ],
)
def test_written_configs_read_back(raw):
    config = decoder_config({**raw, "eos_token_id": 2, "tie_word_embeddings": True})
    assert decoder_config(json.loads(json.dumps(to_hf(config)))) == config
