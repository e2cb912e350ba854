"""An adapter knows the base it was made on: another is named, the same in another dtype is not another."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, init_adapters, load_peft, load_pretrained, save_peft
from stablelora_jax.interop.base_record import base_record, other_base
from stablelora_jax.interop.load_adapted import load_adapted_model
from stablelora_jax.interop.metadata import load_metadata
from stablelora_jax.models.pretrained.load import save_pretrained
from stablelora_jax.quantization import quantize_params
from tests.helpers import tiny_decoder, trained

SPEC = LoraSpec(rank=2)
NORM, Q = ("model", "norm", "scale"), ("model", "layers", "self_attn", "q_proj", "kernel")


def changed(params, path, by):
    """``params`` with one number moved by ``by``."""
    if len(path) > 1:
        return {**params, path[0]: changed(params[path[0]], path[1:], by)}
    leaf = params[path[0]]
    return {**params, path[0]: leaf.at[(0,) * leaf.ndim].add(jnp.asarray(by, leaf.dtype))}


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@pytest.fixture(scope="module")
def params():
    return tiny_decoder()[1]


@pytest.fixture
def adapter(params, tmp_path):
    made = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    save_peft(tmp_path / "a", made, SPEC, base_model="org/one", params=params)
    return tmp_path / "a"


SAME = {
    "itself": lambda params: params,
    "in bfloat16": lambda params: cast(params, jnp.bfloat16),
    "on the host": lambda params: jax.tree.map(np.asarray, params),
}
OTHER = {
    "one number": (lambda params: changed(params, NORM, 1e-6), "model.norm.scale"),
    "one kernel": (lambda params: changed(params, Q, 1e-6), "model.layers.self_attn.q_proj.kernel"),
    "all numbers": (lambda params: jax.tree.map(lambda leaf: leaf * 1.5, params), "more"),
    "in bfloat16": (lambda params: cast(changed(params, Q, 0.5), jnp.bfloat16), "q_proj.kernel"),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_base_says_nothing(params, adapter, case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_peft(adapter, SAME[case](params), base_model="elsewhere", strict=True)


@pytest.mark.parametrize("case", OTHER)
def test_another_base_is_named_with_ours(params, adapter, case):
    make, where = OTHER[case]
    with pytest.warns(UserWarning, match="was trained on org/one, and org/two differs from it in .*" + where) as caught:
        load_peft(adapter, make(params), base_model="org/two")
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with pytest.raises(InputError, match="was trained on org/one, and org/two differs from it.*: give that base, or"):
        load_peft(adapter, make(params), base_model="org/two", strict=True)


def test_what_cannot_be_compared_says_nothing(params):
    record = base_record(params, "one")
    assert other_base(base_record(cast(params, jnp.bfloat16), "one"), params, "two") is None
    assert other_base(record, {"model": {"norm": {"scale": jnp.ones(3)}}}, "two") is None, "of another shape"
    for junk in (None, 3, [], {}, {"fingerprint": 3}, {"fingerprint": {"model.norm.scale": 5}, "rounded": None}):
        assert other_base(junk, params, "two") is None
    assert "another one" in other_base(record, changed(params, NORM, 1), "one")
    assert "a base without a name" in other_base(base_record(params, None), changed(params, NORM, 1), None)


def test_a_quantised_base_is_compared_where_it_is_dense(params):
    record = base_record(quantize_params(params, "nf4"), "one")
    assert other_base(record, params, "two") is None
    assert "model.norm.scale" in other_base(record, changed(params, NORM, 1), "two")


def test_load_adapted_model_and_a_rewritten_adapter(params, adapter, tmp_path):
    model, _ = tiny_decoder()
    save_pretrained(tmp_path / "one", model, params)
    save_pretrained(tmp_path / "two", model, changed(params, NORM, 0.25))
    load_adapted_model(tmp_path / "one", adapter, strict=True)
    with pytest.raises(InputError, match=f"{tmp_path / 'two'} differs from it in model.norm.scale"):
        load_adapted_model(tmp_path / "two", adapter, strict=True)
    with pytest.warns(UserWarning, match="the result is another model than was trained"):
        load_adapted_model(tmp_path / "two", adapter)
    other = load_pretrained(tmp_path / "two")[1]
    save_peft(adapter, init_adapters(jax.random.key(1), other, SPEC), SPEC, params=other)
    load_peft(adapter, other, strict=True)
    assert load_metadata(adapter)["base"]["name"] is None


@pytest.mark.parametrize("files", [["adapter_config.json"], ["adapter_model.safetensors"], ["stablelora.json"]])
def test_an_adapter_of_another_program_is_not_replaced(params, tmp_path, files):
    for name in files:
        (tmp_path / name).write_text(json.dumps({"peft_type": "LORA"}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"{files[0]} was not written by stablelora_jax: choose another directory"):
        save_peft(tmp_path, init_adapters(jax.random.key(0), params, SPEC), SPEC)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors"]
)
def test_a_model_of_another_program_is_not_replaced(params, tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    model, _ = tiny_decoder()
    with pytest.raises(InputError, match=f"{name} was not written by stablelora_jax: choose another directory"):
        save_pretrained(tmp_path, model, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["README.md", name])
    (tmp_path / name).unlink()
    for _ in range(2):  # its own it replaces
        save_pretrained(tmp_path, model, params, max_shard_size=20_000)
    assert (tmp_path / "README.md").read_text() == "mine"
