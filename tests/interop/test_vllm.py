"""Adapters for vLLM: plain LoRA of one rank that means the same, and a check that knows vLLM's rules."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stablelora_jax import InputError, LoraSpec, init_adapters, load_peft, merge
from stablelora_jax.interop.vllm import save_vllm, uniform, vllm_problems
from tests.helpers import largest_difference, tiny_decoder, trained

SPECS = {
    "plain": LoraSpec(rank=4, alpha=7),
    "rslora": LoraSpec(rank=4, alpha=7, scaling="rslora", target_modules="all-linear"),
    "patterns": LoraSpec(
        rank=4,
        scaling="rslora",
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "k_proj": 6},
        alpha_pattern={"down_proj": 3},
    ),
    "pissa": LoraSpec(rank=4, init="pissa"),
    "some_layers": LoraSpec(rank=3, target_modules=r".*\.[02]\..*v_proj"),
    "head_and_embedding": LoraSpec(rank=2, target_modules=["lm_head", "embed_tokens", "q_proj"]),
}


def case(spec, **changes):
    _, params = tiny_decoder(**changes)
    return params, trained(init_adapters(jax.random.key(0), params, spec), spec)


@pytest.mark.parametrize("name", SPECS)
def test_the_same_effect_in_plain_lora(name, tmp_path):
    spec = SPECS[name]
    params, adapters = case(spec)
    rank = save_vllm(tmp_path, adapters, spec, base_model="org/name", params=params)
    assert rank == 8 and vllm_problems(tmp_path) == []
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("base_layer" in key for key in tensors)
    assert {a.shape[0] for key, a in tensors.items() if "_A" in key} == {config["r"]}
    loaded, read = load_peft(tmp_path, params)
    assert largest_difference(merge(params, loaded, read), merge(params, adapters, spec)) < 1e-6


def test_factors_keep_their_bits_where_one_scale_serves():
    params, adapters = case(SPECS["rslora"])
    made, spec = uniform(adapters, SPECS["rslora"])
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (made, adapters)), strict=True))
    assert spec.scale_of("x.q_proj") == SPECS["rslora"].scale_of("x.q_proj") and spec.scaling == "lora"


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(parametrization="dora"), "dora"),
        (dict(modules_to_save=["lm_head"]), "trained in full"),
        (dict(bias="all"), "trained in full"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(rank=513), "ranks up to 512"),
    ],
)
def test_what_vllm_refuses_is_refused_and_nothing_is_written(change, message, tmp_path):
    spec = replace(SPECS["plain"], **change)
    params, adapters = case(spec, qkv_bias=True)
    with pytest.raises(InputError, match=f"{message}.*export it merged"):
        save_vllm(tmp_path / "out", adapters, spec, base_model=None, params=params)
    assert not (tmp_path / "out").exists()


def test_a_tied_embedding_is_refused(tmp_path):
    spec = LoraSpec(rank=2, target_modules=["embed_tokens"])
    params, adapters = case(spec, tie_word_embeddings=True)
    with pytest.raises(InputError, match="embed_tokens where the head is tied"):
        save_vllm(tmp_path, adapters, spec, base_model=None, params=params)


@pytest.mark.parametrize(
    "key,value",
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["embed_tokens"]),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
        ("use_bdlora", {"a": 1}),
        ("use_qalora", True),
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("r", None),
        ("r", 600),
        ("target_modules", None),
    ],
)
def test_the_check_knows_each_rule(key, value, tmp_path):
    params, adapters = case(SPECS["plain"])
    save_vllm(tmp_path, adapters, SPECS["plain"], base_model=None, params=params)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert any(key in problem for problem in vllm_problems(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["q_proj.lora_magnitude_vector", "q_proj.bias", "router.lora_A.weight", "q_proj.lora_A.default.weight"],
)
def test_the_check_knows_the_tensors(name, tmp_path):
    params, adapters = case(SPECS["plain"])
    save_vllm(tmp_path, adapters, SPECS["plain"], base_model=None, params=params)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.model.layers.0.self_attn.{name}": np.zeros((4, 4))}, path)
    assert any(name in problem for problem in vllm_problems(tmp_path))
    assert "above the server's 3" in vllm_problems(tmp_path, max_lora_rank=3)[0]
