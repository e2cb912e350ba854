"""Ids, shapes and kinds that a decoder, a loss and a generation are called with: used, loud, or refused in one line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, generate, init_adapters, load_pretrained
from stablelora_jax.data import Batch, make_batch
from stablelora_jax.data.encoding import Example
from stablelora_jax.evaluation.loglikelihood import Request, likelihoods, make_compute
from stablelora_jax.models.cache import empty_cache
from stablelora_jax.models.pretrained.load import save_pretrained
from stablelora_jax.parallel import pmap_layout
from stablelora_jax.training.loss import summed_loss
from tests.helpers import jit, tiny_decoder

V = 31


@pytest.fixture(scope="module")
def tiny():
    model, params = tiny_decoder()
    assert model.config.vocab_size == V
    apply = jit(lambda *args: model.apply({"params": params}, *args))
    return model, params, apply


def row(*ids):
    return jnp.array([ids], jnp.int32)


@pytest.mark.parametrize("bad", [-1, V, V + 5, -(2**31), 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_loud_and_in_a_pad_nothing(tiny, bad):
    model, params, apply = tiny
    good = apply(row(1, 2, 3, 4))
    there = apply(row(1, bad, 3, 4))
    assert jnp.isnan(there[0, 1:]).all() and not jnp.isnan(good).any()
    positions, segments = row(0, 1, 2, 3), row(1, 1, 0, 0)
    pads = [apply(row(1, 2, *ids), positions, segments)[0, :2] for ids in ((0, 0), (bad, bad))]
    np.testing.assert_array_equal(*pads)
    cache = empty_cache(model.config, 1, 8, jnp.float32)
    with_pad = [
        model.apply({"params": params}, row(1, 2, token), row(0, 1, -1), cache=cache)[0][0, :2] for token in (0, bad)
    ]
    np.testing.assert_array_equal(*with_pad)


@pytest.mark.parametrize("bad", [-1, V, V + 5])
def test_a_learnt_token_outside_the_vocabulary_is_loud_and_in_a_pad_nothing(tiny, bad):
    model, params, _ = tiny
    spec = LoraSpec(rank=2)
    lora, adapters = adapted(model, spec), init_adapters(jax.random.key(0), params, spec)

    @jit
    @jax.value_and_grad
    def loss(adapters, last, mask):
        tokens = jnp.array([[1, 2, 3, 0]]).at[0, 3].set(last)
        batch = Batch(
            tokens, mask, jnp.array([[1, 1, 1, 0]]) + mask[:, 3:] * (jnp.arange(4) == 3)[None], row(0, 1, 2, 3)
        )
        return summed_loss(lora, {"params": params, "lora": adapters}, batch)

    assert jnp.isnan(loss(adapters, bad, row(0, 1, 1, 1))[0])
    (value, grads), (same, _) = loss(adapters, bad, row(0, 1, 1, 0)), loss(adapters, 5, row(0, 1, 1, 0))
    assert value == same and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


SHAPES = {
    "no rows": jnp.zeros((0, 4), jnp.int32),
    "no columns": jnp.zeros((2, 0), jnp.int32),
    "one axis": jnp.array([1, 2]),
    "three axes": jnp.ones((1, 2, 3), jnp.int32),
    "floats": jnp.array([[1.0, 2.0]]),
    "truths": jnp.array([[True, False]]),
    "text": "x",
    "none": None,
    "ragged": [[1, 2], [3]],
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_no_tokens_is_one_line(tiny, name):
    model, params, _ = tiny
    with pytest.raises(InputError, match="tokens must be whole numbers .rows, columns.") as error:
        model.apply({"params": params}, SHAPES[name])
    assert "\n" not in str(error.value)


OTHERS = {
    "positions": ({"positions": row(0)}, "positions must have the shape of the tokens"),
    "positions of floats": ({"positions": jnp.ones((1, 2))}, "positions must be whole numbers"),
    "segments": ({"segment_ids": row(1)}, "segment_ids must have the shape of the tokens"),
    "places of nothing": ({"logit_positions": jnp.zeros((1, 0), jnp.int32)}, "logit_positions must be whole numbers"),
    "places of floats": ({"logit_positions": jnp.ones((1, 1))}, "logit_positions must be whole numbers"),
    "places of other rows": (
        {"logit_positions": jnp.ones((3, 1), jnp.int32)},
        "a row for each of 1 rows of tokens, not 3",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_go_with_the_tokens_is_one_line(tiny, name):
    model, params, _ = tiny
    how, message = OTHERS[name]
    with pytest.raises(InputError, match=message):
        model.apply({"params": params}, row(1, 2), **how)


BATCHES = {
    "no rows": dict(tokens=np.zeros((0, 4), np.int32)),
    "no columns": dict(tokens=np.zeros((1, 0), np.int32)),
    "floats": dict(tokens=np.ones((1, 2))),
    "a mask of another shape": dict(tokens=np.ones((1, 4), np.int32), loss_mask=np.ones((1, 2))),
    "a mask of text": dict(tokens=np.ones((1, 4), np.int32), loss_mask=np.array([["x"] * 4])),
    "places of nothing": dict(tokens=np.ones((1, 4), np.int32), loss_positions=np.zeros((1, 0), np.int32)),
    "places of floats": dict(tokens=np.ones((1, 4), np.int32), loss_positions=np.ones((1, 1))),
}


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_no_batch_is_one_line(tiny, name):
    model, params, _ = tiny
    tokens = BATCHES[name]["tokens"]
    usual = {key: np.ones(tokens.shape, np.int32) for key in ("loss_mask", "segment_ids", "positions")}
    with pytest.raises((InputError, TypeError)) as error:
        summed_loss(
            adapted(model, LoraSpec()), {"params": params}, Batch(**{**usual, "loss_positions": None, **BATCHES[name]})
        )
    assert error.type is InputError or name == "a mask of text"


def test_examples_that_are_none_are_one_line():
    for examples in ([], [Example((2**40, 1), 0)], [Example(("x",), 0)]):
        with pytest.raises(InputError):
            make_batch(examples)


def test_texts_beyond_the_vocabulary_are_not_measured(tiny):
    model, params, _ = tiny
    layout = pmap_layout(jax.devices()[:1])
    inner = make_compute(model, layout)
    compute = lambda rows: inner(layout.place_base(params), layout.place_state({}), rows)
    assert np.isfinite(likelihoods(compute, [Request((1, 2), (3,))], rows=1, max_length=8)[0].total)
    for request in (Request((1, V), (3,)), Request((1, 2), (V + 3,)), Request((1, -1), (3,))):
        with pytest.raises(InputError, match=f"gives ids beyond its vocabulary of {V}"):
            likelihoods(compute, [request], rows=1, max_length=8)


GENERATIONS = {
    "a cache of bytes": (dict(cache_dtype="int8"), "cache_dtype must be a float dtype"),
    "a cache of truths": (dict(cache_dtype=bool), "cache_dtype must be a float dtype"),
    "a cache of nothing": (dict(cache_dtype="x"), "cache_dtype must be a dtype"),
    "a wide cache": (dict(cache_dtype="float64"), "cache_dtype must be a float dtype that jax has here"),
    "a temperature of text": (dict(temperature="1"), "temperature must be"),
    "no temperature": (dict(temperature=None), "temperature must be"),
    "a cold temperature": (dict(temperature=1e-39), "temperature 1e-39 is beyond float32's range"),
    "a hot temperature": (dict(temperature=1e300), "temperature 1e.300 is beyond float32's range"),
    "top_p of text": (dict(temperature=1.0, top_p="1"), "top_p must be"),
    "no stop strings": (dict(stop_strings=None), "stop_strings must be a list"),
    "a long seed": (dict(seed=2**64), "seed must be a whole number of 64 bits"),
    "a seed of text": (dict(seed="x"), "seed must be a whole number of 64 bits"),
    "half a seed": (dict(seed=1.5), "seed must be a whole number of 64 bits"),
    "a batch of text": (dict(batch_size="1"), "batch_size must be positive"),
    "half a batch": (dict(batch_size=1.5), "batch_size must be positive"),
    "a true batch": (dict(batch_size=True), "batch_size must be positive"),
    "no variables": (dict(variables=None), "variables must hold"),
    "no parameters": (dict(variables={}), "variables must hold"),
    "no model": (dict(model=None), "a model is a Decoder"),
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_what_a_generation_cannot_use_is_one_line(tiny, name):
    model, params, _ = tiny
    how, message = GENERATIONS[name]
    given = {"model": model, "variables": {"params": params}, "prompts": [[1, 2]], "max_new_tokens": 2, **how}
    with pytest.raises(InputError, match=message) as error:
        generate(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("what", ["parameters", "adapters"])
def test_numbers_that_are_none_are_not_continued(tiny, what, temperature):
    model, params, _ = tiny
    spec = LoraSpec(rank=2)
    adapters = init_adapters(jax.random.key(0), params, spec)
    spoil = lambda tree: jax.tree.map(lambda leaf: leaf * jnp.nan, tree)
    variables = {"params": spoil(params) if what == "parameters" else params, "lora": adapters}
    variables |= {"lora": spoil(adapters)} if what == "adapters" else {}
    with pytest.raises(InputError, match="logits that are not finite: its parameters or adapters hold NaN"):
        generate(adapted(model, spec), variables, [[1, 2]], max_new_tokens=2, temperature=temperature)


def test_a_huge_batch_is_no_longer_than_the_prompts(tiny):
    model, params, _ = tiny
    few = [g.tokens for g in generate(model, {"params": params}, [[1, 2], [3]], max_new_tokens=2, batch_size=10**8)]
    assert few == [g.tokens for g in generate(model, {"params": params}, [[1, 2], [3]], max_new_tokens=2)]
    assert generate(model, {"params": params}, [[1]], max_new_tokens=1, temperature=1.0, seed=2**64 - 1)


@pytest.mark.parametrize("value", [2**40, -(2**40), "x", [1, "a"], {"a": 1}, True, 1.5])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_ids_that_are_none_are_refused(tmp_path, file, value):
    save_pretrained(tmp_path, *tiny_decoder())
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": value}))
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()
    with pytest.raises(InputError, match="eos_token_id must be token ids"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("shard", [None, 3, ["a"], "", "../x", "x" * 300])
def test_an_index_names_files(tmp_path, shard):
    save_pretrained(tmp_path, *tiny_decoder())
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": shard, "lm_head.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="index.json (names the shard|has no readable)|lacks the shard") as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_the_end_ids_of_a_model_fit_int32(tiny):
    model, params, _ = tiny
    far = model.clone(config=dataclasses.replace(model.config, eos_token_id=(2**40,)))
    with pytest.raises(InputError, match="must be a list of token ids"):
        generate(far, {"params": params}, [[1]], max_new_tokens=1)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 300, "a\0b", "\ud800"])
def test_names_that_no_file_system_takes_are_one_line(name):
    from stablelora_jax.models.pretrained.shapes import architecture

    for read in (load_pretrained, architecture):
        with pytest.raises(InputError, match="the model") as error:
            read(name)
        assert str(error.value).encode() and "\n" not in str(error.value)
