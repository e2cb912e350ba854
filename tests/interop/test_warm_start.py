"""A new run from an adapter: the same function, or one line with all that differs."""

import json
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, save_peft
from stablelora_jax.interop.warm_start import start_adapters
from tests.helpers import jit, tiny_decoder, tokens, trained
from tests.interop.test_peft import SPECS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def case(spec, tied=False):
    model, params = tiny_decoder(qkv_bias=True, o_bias=True, tie_word_embeddings=tied)
    return model, params, trained(init_adapters(jax.random.key(0), params, spec), spec)


@pytest.mark.parametrize("name", SPECS)
def test_an_adapter_begins_a_run_of_its_own_spec(name, tmp_path):
    spec = SPECS[name]
    _, params, adapters = case(spec, name.startswith("tied"))
    save_peft(tmp_path, adapters, spec, params=params)
    started = start_adapters(tmp_path, params, replace(spec, dropout=0.3))
    chex.assert_trees_all_equal(started, adapters)
    fresh = init_adapters(jax.random.key(1), params, spec)
    chex.assert_trees_all_equal_shapes_and_dtypes(started, fresh)


OLD = LoraSpec(rank=4, alpha=8, target_modules=["q_proj", "v_proj"])
SAME = {  # written otherwise
    "expression": dict(target_modules=r".*self_attn\.[qv]_proj"),
    "whole_names": dict(
        target_modules=tuple(f"model.layers.{i}.self_attn.{m}" for i in range(3) for m in ("q_proj", "v_proj"))
    ),
    "exclude": dict(target_modules=["q_proj", "k_proj", "v_proj"], exclude_modules=["k_proj"]),
    "layers": dict(layers_to_transform=(0, 1, 2)),
    "patterns": dict(rank=16, alpha=1, rank_pattern={"q_proj": 4, "v_proj": 4}, alpha_pattern={"[qv]_proj": 8}),
    "scaling": dict(scaling="rslora", alpha=4),
    "dropout": dict(dropout=0.5),
}
OTHER = {
    "rank": (dict(rank=8, alpha=16), ["lora.rank is 4 in THERE and 8 here"]),
    "rank_and_scale": (dict(rank=8), ["lora.rank is 4 in THERE and 8 here"]),
    "alpha": (dict(alpha=9), ["lora.alpha is 8 in THERE and 9 here"]),
    "scaling": (dict(scaling="rslora"), ["lora.scaling is lora in THERE and rslora here"]),
    "rank_pattern": (
        dict(rank_pattern={"layers.1.*q_proj": 2}, alpha_pattern={"layers.1.*q_proj": 4}),
        [
            "lora.rank_pattern is {} in THERE and {'layers.1.*q_proj': 2} here",
        ],
    ),
    "alpha_pattern": (dict(alpha_pattern={"v_proj": 2}), ["lora.alpha_pattern is {} in THERE and {'v_proj': 2} here"]),
    "more": (
        dict(target_modules=["q_proj", "v_proj", "o_proj"]),
        ["lora.target_modules adapts model.layers.0.self_attn.o_proj and 2 more here, not in THERE"],
    ),
    "fewer": (
        dict(target_modules=["q_proj"]),
        ["lora.target_modules adapts model.layers.0.self_attn.v_proj and 2 more in THERE only"],
    ),
    "layers": (
        dict(layers_to_transform=(0, 1), exclude_modules=["layers.0.self_attn.q_proj"]),
        ["q_proj and 2 more in THERE only"],
    ),
    "one": (
        dict(exclude_modules=["layers.1.self_attn.v_proj"]),
        ["lora.target_modules adapts model.layers.1.self_attn.v_proj in THERE only"],
    ),
    "dora": (dict(parametrization="dora"), ["lora.parametrization is lora in THERE and dora here"]),
    "lora_bias": (dict(lora_bias=True), ["lora.lora_bias is False in THERE and True here"]),
    "saved": (dict(modules_to_save=["lm_head"]), ["lora.modules_to_save is [] in THERE and ['lm_head'] here"]),
    "bias": (dict(bias="all"), ["lora.bias is none in THERE and all here"]),
    "several": (
        dict(rank=2, alpha=7, target_modules=["q_proj"], parametrization="dora", bias="lora_only"),
        ["lora.target_modules adapts", "lora.rank is 4", "lora.alpha is 8", "lora.parametrization", "lora.bias"],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_adapter_written_otherwise_fits(name, tmp_path):
    model, params, adapters = case(OLD)
    spec = replace(OLD, **SAME[name])
    save_peft(tmp_path / "there", adapters, OLD, params=params)
    started = start_adapters(tmp_path / "there", params, spec)
    chex.assert_trees_all_equal(started, adapters)
    logits = lambda s, a: adapted(model, s).apply({"params": params, "lora": a}, tokens())
    chex.assert_trees_all_close(logits(spec, started), logits(OLD, adapters), atol=1e-5)
    save_peft(tmp_path / "back", adapters, spec, params=params)
    chex.assert_trees_all_equal(start_adapters(tmp_path / "back", params, OLD), adapters)


@pytest.mark.parametrize("name", OTHER)
def test_another_function_is_refused_with_all_that_differs(name, tmp_path):
    _, params, adapters = case(OLD)
    change, messages = OTHER[name]
    save_peft(tmp_path, adapters, OLD, params=params)
    with pytest.raises(InputError) as caught:
        start_adapters(tmp_path, params, replace(OLD, **change))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path} does not fit this run: lora.") and "\n" not in text
    parts = text.split("; ")
    assert len(parts) == len(messages) and all(m.replace("THERE", str(tmp_path)) in text for m in messages)


def test_what_is_trained_in_full_is_compared_by_what_it_is(tmp_path):
    spec = replace(OLD, modules_to_save=["layers.1.input_layernorm", "lm_head"])
    _, params, adapters = case(spec)
    save_peft(tmp_path, adapters, spec, params=params)
    same = replace(spec, modules_to_save=["model.layers.1.input_layernorm", "lm_head"])
    chex.assert_trees_all_equal(start_adapters(tmp_path, params, same), adapters)
    with pytest.raises(InputError, match=r"does not fit this run: lora.modules_to_save is \['layers.1.inp.*layers.2"):
        start_adapters(tmp_path, params, replace(spec, modules_to_save=["layers.2.input_layernorm", "lm_head"]))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
def test_any_float_type_becomes_float32(stored, tmp_path):
    spec = SPECS["everything"]
    model, params, adapters = case(spec)
    save_peft(tmp_path, adapters, spec, params=params)
    file, dtype = tmp_path / WEIGHTS, jnp.dtype(stored)
    save_file({k: v.astype(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    started = start_adapters(tmp_path, params, spec)
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), adapters)
    chex.assert_trees_all_equal(started, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(started)} == {np.dtype(np.float32)}


def test_float64_where_it_is_enabled(x64, tmp_path):
    _, params, _ = case(OLD)
    adapters = init_adapters(jax.random.key(0), params, OLD, dtype=jnp.float64)
    save_peft(tmp_path, adapters, OLD, params=params)
    chex.assert_trees_all_equal(start_adapters(tmp_path, params, OLD, dtype=jnp.float64), adapters)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), adapters)
    chex.assert_trees_all_equal(start_adapters(tmp_path, params, OLD), rounded)
    huge = load_file(tmp_path / WEIGHTS)
    huge["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = 1e300
    save_file(huge, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="q_proj.lora_a holds values out of the range of float32"):
        start_adapters(tmp_path, params, OLD)


def test_the_first_logits_are_those_of_the_adapter_as_peft_computes_them(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    from stablelora_jax import save_pretrained

    model, params = tiny_decoder()
    save_pretrained(tmp_path / "base", model, params)
    chosen = peft.LoraConfig(r=4, lora_alpha=9, use_dora=True, target_modules=["q_proj", "up_proj"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.get_peft_model(base, chosen)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    spec = LoraSpec(rank=4, alpha=9, target_modules=r".*(q|up)_proj", parametrization="dora", dropout=0.1)
    started = start_adapters(tmp_path / "adapter", params, spec)
    ours = jit(lambda a: adapted(model, spec).apply({"params": params, "lora": a}, tokens()))(started)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(np.asarray(tokens()))).logits.numpy()
    assert np.abs(ours - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_what_is_no_adapter_of_this_base_is_refused(tmp_path):
    _, params, adapters = case(OLD)
    with pytest.raises(InputError, match="adapter_config.json does not exist"):
        start_adapters(tmp_path, params, OLD)
    save_peft(tmp_path, adapters, OLD, params=params)
    _, smaller = tiny_decoder(hidden_size=8, head_dim=2)
    with pytest.raises(InputError, match="of another model"):
        start_adapters(tmp_path, smaller, OLD)
    with pytest.raises(InputError, match="target_modules 'q_prj' matches no module"):
        start_adapters(tmp_path, params, replace(OLD, target_modules=["q_prj"]))
    raw = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**raw, "r": 5}))
    with pytest.raises(InputError, match="has shape"):
        start_adapters(tmp_path, params, replace(OLD, rank=5))
