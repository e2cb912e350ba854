"""Directories in and out, and every way in which one can be wrong."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from stablelora_jax import InputError, load_pretrained, save_pretrained
from stablelora_jax.models.pretrained import safetensors as weights
from stablelora_jax.models.pretrained import tensors
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.models.pretrained.safetensors import hf_arrays, hf_tensors
from stablelora_jax.models.untie import untie
from tests.helpers import largest_difference, tiny_decoder, tokens


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
    "nan": (
        lambda t: t["model.layers.2.mlp.up_proj.weight"].__setitem__((3, 2), np.nan),
        "model.layers.2.mlp.up_proj.weight holds NaN or infinite numbers in float32",
    ),
    "infinite": (
        lambda t: t["model.embed_tokens.weight"].__setitem__((30, 15), -np.inf),
        "model.embed_tokens.weight holds NaN or infinite",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}),
        "model.norm.weight holds int8, not floating-point",
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


def test_numbers_beyond_the_dtype_are_named(saved):
    rewrite(saved[0], lambda t: t["model.norm.weight"].__setitem__(0, 1e6))
    load_pretrained(saved[0], dtype=jnp.bfloat16)
    with pytest.raises(InputError, match="model.norm.weight holds NaN or infinite numbers in float16"):
        load_pretrained(saved[0], dtype=jnp.float16)


def test_leaves_go_where_they_are_told(saved):
    directory, _, params = saved
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    spread, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, None, "x"), ()))
    _, whole = load_pretrained(directory, sharding=everywhere)
    assert {leaf.sharding for leaf in jax.tree.leaves(whole)} == {everywhere}
    seen = {}

    def rule(path, shape):
        seen[path] = shape
        return spread if path[-1] == "kernel" and len(shape) == 3 else everywhere

    _, parts = load_pretrained(directory, sharding=rule)
    chex.assert_trees_all_equal(parts, params)
    up = parts["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert up.sharding == spread and {s.data.shape for s in up.addressable_shards} == {(3, 16, 12)}
    assert seen[("model", "norm", "scale")] == (16,) and len(seen) == len(jax.tree.leaves(params))
    uneven = NamedSharding(mesh, PartitionSpec("x"))
    with pytest.raises(InputError, match=r"embed_tokens.embedding of shape \(31, 16\) cannot be laid out") as error:
        load_pretrained(directory, sharding=uneven)
    assert "\n" not in str(error.value)


def test_leaves_are_not_copied_on_their_way(saved):
    """A CPU device takes over the buffer that was filled (the copy would double the peak)."""
    out = weights._aligned((5, 33), np.dtype(np.float32))
    out[...] = 1
    assert weights._place(("x",), out, None).unsafe_buffer_pointer() == out.ctypes.data


def test_shards(tmp_path):
    """Written in parts of a given size, read by us and by transformers; the other form of before is gone."""
    model, params = tiny_decoder()
    save_pretrained(tmp_path, model, params)
    names = lambda: {file.name for file in tmp_path.iterdir()}
    always = {"config.json", "generation_config.json"}
    assert names() == always | {"model.safetensors"}
    save_pretrained(tmp_path, model, params, max_shard_size=5000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and names() == always | files | {"model.safetensors.index.json"}
    assert sorted(files)[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for file in files:
        held = load_file(tmp_path / file)
        assert {name for name, own in index["weight_map"].items() if own == file} == set(held)
        assert sum(t.nbytes for t in held.values()) <= 5000 or len(held) == 1
    chex.assert_trees_all_equal(load_pretrained(tmp_path)[1], params)
    save_pretrained(tmp_path, model, params)
    assert names() == always | {"model.safetensors"}


def test_a_crash_while_writing_leaves_what_was_there(saved, monkeypatch):
    directory, model, params = saved
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="cannot write .*: disk full"):
        save_pretrained(directory, model, jax.tree.map(lambda p: p + 1, params))
    assert before.items() <= {file.name: file.read_bytes() for file in directory.iterdir()}.items()


def test_the_dtype_that_is_written(saved):
    directory, model, params = saved
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for given, dtype, name in (
        (half, None, "bfloat16"),
        (half, jnp.float32, "float32"),
        (params, jnp.float16, "float16"),
    ):
        save_pretrained(directory, model, given, dtype=dtype)
        assert json.loads((directory / "config.json").read_text())["dtype"] == name
        assert {str(t.dtype) for t in load_file(directory / "model.safetensors").values()} == {name}


def test_end_ids_are_those_of_generation_config(tmp_path):
    model, params = tiny_decoder(eos_token_id=(2,), bos_token_id=1)
    save_pretrained(tmp_path, model, params)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2]}
    assert load_pretrained(tmp_path)[0].config == model.config
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.7}')
    assert load_pretrained(tmp_path)[0].config.eos_token_id == (2, 5)
    (tmp_path / "generation_config.json").unlink()
    assert load_pretrained(tmp_path)[0].config.eos_token_id == (2,)


def test_untie(tmp_path):
    tied, params = tiny_decoder(tie_word_embeddings=True)
    model, untied = untie(tied, params)
    assert not model.config.tie_word_embeddings and tied.config.tie_word_embeddings and "lm_head" not in params
    expected = tied.apply({"params": params}, tokens())
    assert largest_difference(model.apply({"params": untied}, tokens()), expected) < 1e-6
    chex.assert_trees_all_equal_shapes_and_dtypes(untied, abstract_params(model))
    save_pretrained(tmp_path, model, untied)
    chex.assert_trees_all_equal(load_pretrained(tmp_path)[1], untied)
    assert untie(model, untied) == (model, untied)


def test_a_tied_head_in_the_file_is_ignored_and_old_buffers_too(tmp_path):
    model, params = tiny_decoder(tie_word_embeddings=True)
    save_pretrained(tmp_path, model, params)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}))
    chex.assert_trees_all_equal(load_pretrained(tmp_path)[1], params)


def test_a_tied_head_is_compared_in_parts(tmp_path, monkeypatch):
    """Never as two whole copies, and to the last row."""
    model, params = tiny_decoder(tie_word_embeddings=True)
    save_pretrained(tmp_path, model, params)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    monkeypatch.setattr(weights, "PART", 48)
    chex.assert_trees_all_equal(load_pretrained(tmp_path)[1], params)
    source = tensors.safetensors_source(tmp_path)
    assert source.rows("lm_head.weight", slice(30, 31)).shape == (1, 16)
    weights._check_tied_head({}, source._replace(read=None))
    rewrite(tmp_path, lambda t: t["lm_head.weight"].__setitem__((30, 15), 9.0))
    with pytest.raises(InputError, match="lm_head.weight differs"):
        load_pretrained(tmp_path)


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
    "generation_not_json": (
        lambda d: (d / "generation_config.json").write_text("["),
        "generation_config.json is not JSON",
    ),
    "generation_wrong": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        "eos_token_id must be token ids",
    ),
    "config_no_text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "config_deep": (lambda d: (d / "config.json").write_text("[" * 100_000), "is not JSON"),
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
    for odd in (3, "../m/model-1.safetensors", ""):
        wrong = {"weight_map": dict.fromkeys(index["weight_map"], odd)}
        (directory / "model.safetensors.index.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="is not the name of a file beside it"):
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
