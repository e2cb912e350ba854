"""Directories in and out, and every way in which one can be wrong."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stablelora_jax import InputError, load_pretrained, save_pretrained
from stablelora_jax.models.weights import hf_arrays, hf_tensors
from tests.helpers import tiny_decoder, tokens


@pytest.fixture
def saved(tmp_path):
    model, params = tiny_decoder(qkv_bias=True, o_bias=True)
    save_pretrained(tmp_path / "m", model, params)
    return tmp_path / "m", model, params


def test_round_trip(saved):
    directory, model, params = saved
    again, loaded = load_pretrained(directory)
    chex.assert_trees_all_equal(loaded, params)
    assert again.config == model.config and again.tokenizer is None
    assert hash(again) == hash(load_pretrained(directory)[0]) and again == load_pretrained(directory)[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_is_the_callers(saved, dtype):
    directory, _, params = saved
    model, loaded = load_pretrained(directory, dtype=dtype)
    chex.assert_trees_all_equal(loaded, jax.tree.map(lambda p: p.astype(dtype), params))
    assert model.apply({"params": loaded}, tokens()).dtype == jnp.float32


def test_float64_needs_x64(saved):
    with pytest.raises(InputError, match="jax_enable_x64"):
        load_pretrained(saved[0], dtype=jnp.float64)


def test_names_and_layout(saved):
    _, _, params = saved
    arrays = dict(hf_arrays(params))
    kernel = params["model"]["layers"]["self_attn"]["k_proj"]["kernel"]
    assert np.array_equal(arrays["model.layers.1.self_attn.k_proj.weight"], kernel[1].T)
    assert arrays["model.embed_tokens.weight"].shape == (31, 16) and arrays["lm_head.weight"].shape == (31, 16)
    assert hf_tensors(("model", "norm", "scale"), (16,)) == [("model.norm.weight", (16,))]


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


BAD_TENSORS = {
    "missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        "lacks tensors: model.layers.1.mlp.up_proj.weight",
    ),
    "extra": (
        lambda t: t.update({"model.layers.7.x.weight": np.ones(2)}),
        "holds unknown tensors: model.layers.7.x.weight",
    ),
    "shape": (
        lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}),
        r"model.norm.weight has shape \(3,\), its configuration says \(16,\)",
    ),
    "transposed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((16, 24), np.float32)}),
        "model.layers.0.mlp.up_proj.weight has shape",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_wrong_tensors_are_named(saved, case):
    change, message = BAD_TENSORS[case]
    rewrite(saved[0], change)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(saved[0])
    assert "\n" not in str(error.value)


def test_a_tied_head_in_the_file_is_ignored_and_old_buffers_too(tmp_path):
    model, params = tiny_decoder(tie_word_embeddings=True)
    save_pretrained(tmp_path, model, params)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}))
    chex.assert_trees_all_equal(load_pretrained(tmp_path)[1], params)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    model, params = tiny_decoder(tie_word_embeddings=True)
    save_pretrained(tmp_path, model, params)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(InputError, match="lm_head.weight differs"):
        load_pretrained(tmp_path)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


BAD_FILES = {
    "no_config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config_not_json": (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    "config_a_list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
    "no_weights": (lambda d: (d / "model.safetensors").unlink(), "holds neither model.safetensors"),
    "pickles": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pickled weights such as pytorch_model.bin are never read",
    ),
    "cut_in_header": (lambda d: cut(d / "model.safetensors", 100), "not a readable safetensors file"),
    "cut_in_data": (lambda d: cut(d / "model.safetensors", 9000), "not a readable safetensors file"),
    "empty": (lambda d: cut(d / "model.safetensors", 0), "not a readable safetensors file"),
    "bad_tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "its tokenizer cannot be read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_directories(saved, case):
    change, message = BAD_FILES[case]
    change(saved[0])
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(saved[0])
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(saved):
    directory = saved[0]
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    index = {"weight_map": {name: "model-1.safetensors" for name in load_file(directory / "model-1.safetensors")}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    chex.assert_trees_all_equal(load_pretrained(directory)[1], saved[2])
    index["weight_map"]["model.norm.weight"] = "model-2.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lacks the shard model-2.safetensors"):
        load_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="no readable weight_map"):
        load_pretrained(directory)


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing here", "no-such-org-xyz/no-such-model"])
def test_names_that_lead_nowhere(name):
    with pytest.raises(InputError) as error:
        load_pretrained(name)
    assert name.removeprefix("./") in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="not a .gguf"):
        load_pretrained(tmp_path / "weights.bin")
