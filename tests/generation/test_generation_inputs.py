"""What is not what it should be, at the doors below ``generate``: used, or one line, and never another number."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, generate, init_adapters, load_pretrained, make_bank
from stablelora_jax.data import make_batch
from stablelora_jax.data.encoding import Example
from stablelora_jax.evaluation.loglikelihood import Request, likelihoods
from stablelora_jax.evaluation.tasks import TaskResult, measure, subject, table
from stablelora_jax.generation.bank import banked
from stablelora_jax.generation.decode import generate_tokens
from stablelora_jax.generation.sampling import sampling, warp
from stablelora_jax.models.pretrained.shapes import architecture
from stablelora_jax.utils.files import read_json_object
from tests.helpers import tiny_decoder
from tests.models.test_inputs import V


@pytest.fixture(scope="module")
def tiny():
    return tiny_decoder()


TOKENS = {
    "beyond int32": (dict(tokens=np.array([[2**33 + 1, 2]])), f"token id {2**33 + 1} is outside"),
    "floats": (dict(tokens=[[1.5, 2.0]]), "tokens must be whole numbers, not float64"),
    "text": (dict(tokens=[["a", "b"]]), "tokens must be whole numbers"),
    "ragged": (dict(tokens=[[1], [1, 2]]), "tokens and mask must be arrays"),
    "variables None": (dict(variables=None), 'variables must hold "params"'),
    "variables empty": (dict(variables={}), 'variables must hold "params"'),
    "other parameters": (dict(variables={"params": {"model": {"x": 1}}}), "parameters are not those of the model"),
    "stop beyond int32": (dict(stop_ids=[2**40]), "stop_ids must be a list of token ids"),
    "stop None": (dict(stop_ids=None), "stop_ids must be a list of token ids"),
    "stop text": (dict(stop_ids="1"), "stop_ids must be a list of token ids"),
    "stop true": (dict(stop_ids=[True]), "stop_ids must be a list of token ids"),
    "rows": (dict(rows=[0, 1, 2]), "rows must be a whole number for each of 1 rows"),
    "rows of floats": (dict(rows=[0.5]), "rows must be a whole number for each of 1 rows"),
    "key": (dict(key=3), "key must be a key"),
    "settings": (dict(settings="x"), "settings must be what sampling"),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_not_continued(tiny, name):
    model, params = tiny
    changes, message = TOKENS[name]
    given = {"variables": {"params": params}, "tokens": [[1, 2]], "mask": [[1, 1]], "max_new_tokens": 2} | changes
    given["mask"] = given["mask"] if name != "ragged" else [[1], [1, 1]]
    with pytest.raises(InputError, match=message):
        generate_tokens(model, **given)


def test_an_id_in_a_pad_does_not_matter_and_stops_may_be_an_array(tiny):
    model, params = tiny
    made = [
        generate_tokens(model, {"params": params}, [[1, pad]], [[1, 0]], max_new_tokens=3, stop_ids=np.array([-1]))[0]
        for pad in (0, 2**40)
    ]
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("temperature", [1.2e-38, 3e-38, 1e-30])
def test_a_temperature_just_above_the_smallest_takes_the_likeliest(tiny, temperature):
    model, params = tiny
    logits = jnp.array([[3.0, 40.0, -5.0, 39.0]])
    probs = jax.nn.softmax(warp(logits, sampling(temperature, None, None)))
    np.testing.assert_array_equal(probs, [[0, 1, 0, 0]])
    large = {"params": jax.tree.map(lambda x: x * 30, params)}
    (cold,), (greedy,) = (generate(model, large, [[1, 2]], max_new_tokens=4, temperature=t) for t in (temperature, 0.0))
    assert cold.tokens == greedy.tokens


EXAMPLES = {
    "floats": ([Example((1.5, 2), 0)], {}, "example 0 holds what is no token id"),
    "none": ([Example((1, 2), 0), Example(None, 0)], {}, "example 1 holds what is no token id"),
    "nested": ([Example(((1, 2), (3, 4)), 0)], {}, "example 0 holds what is no token id"),
    "beyond int32": ([Example((2**40, 1), 0)], {}, "example 0 holds what is no token id"),
    "text": (["x"], {}, "example 0 holds what is no token id"),
    "answer": ([Example((1, 2), None)], {}, "example 0 holds what is no token id"),
    "no list": (3, {}, "at least one example"),
    "too long": ([Example(range(40), 0)], {"longest": 3}, "1 examples of up to 40 tokens do not fit in 1 rows of 32"),
    "too many": ([Example((1, 2), 0)] * 3, {"rows": 2}, "3 examples of up to 2 tokens do not fit in 2 rows"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_make_no_batch(name):
    examples, sizes, message = EXAMPLES[name]
    with pytest.raises(InputError, match=message):
        make_batch(examples, **sizes)


def test_examples_of_any_integers_make_one():
    for tokens in ((), (1, 2), np.array([1, 2], np.uint16), np.array([1, 2]), range(3)):
        assert make_batch([Example(tokens, 0)]).segment_ids.sum() == len(tokens)


@pytest.mark.parametrize("rows", [None, "x", [0.5], [[0]], [None], [2**40], [True], {}, [[0], [0, 1]]], ids=repr)
def test_a_bank_s_rows_are_whole_numbers(tiny, rows):
    model, params = tiny
    spec = LoraSpec(rank=2)
    bank = make_bank(params, [(init_adapters(jax.random.key(0), params, spec), spec)])
    variables = {"params": params, "bank": bank, "rows": rows}
    with pytest.raises(InputError, match="row"):
        banked(model).apply(variables, jnp.ones((1, 2), jnp.int32))
    if rows != [[0], [0, 1]]:
        with pytest.raises(InputError, match="rows"):
            generate(banked(model), variables, [[1, 2]], max_new_tokens=1)


@pytest.mark.parametrize("bank", [None, 3, {}])
def test_a_bank_is_one(tiny, bank):
    model, params = tiny
    variables = {"params": params, "bank": bank, "rows": np.array([0])}
    with pytest.raises(InputError, match='"bank"'):
        banked(model).apply(variables, jnp.ones((1, 2), jnp.int32))
    with pytest.raises(InputError, match='"bank"'):
        generate(banked(model), variables, [[1, 2]], max_new_tokens=1)
    with pytest.raises(InputError, match="variables must be Mapping"):
        banked(model).apply(None, jnp.ones((1, 2), jnp.int32))


@pytest.mark.parametrize("link", [False, True])
def test_a_configuration_that_is_no_file_is_not_waited_for(tmp_path, link):
    for name in ("config.json", "adapter_config.json"):
        os.mkfifo(tmp_path / (f"pipe-{name}" if link else name))
        if link:
            (tmp_path / name).symlink_to(f"pipe-{name}")
    with pytest.raises(InputError, match="config.json cannot be read: it is no regular file"):
        architecture(str(tmp_path))
    with pytest.raises(InputError, match="it is no regular file"):
        read_json_object(tmp_path / "adapter_config.json")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The package's base, and a directory with a text that is one long word."""
    from stablelora_jax import base_directory

    data = tmp_path_factory.mktemp("data")
    (data / "text").mkdir()
    (data / "text" / "validation.jsonl").write_text(json.dumps({"text": "abcdefghij" * 80}) + "\n")
    return *load_pretrained(base_directory()), data


def test_one_long_word_has_no_perplexity_of_words(measured):
    model, params, data = measured
    found = measure(subject(model, {"params": params}, batch_size=4), "text", data)
    assert found.summary["word_perplexity"] is None and math.isfinite(found.summary["byte_perplexity"])
    json.dumps(found.summary, allow_nan=False)
    assert "word_perplexity   -" in table({"text": TaskResult(found.rows, found.summary)})


def test_what_is_not_finite_is_not_measured(measured):
    model, params, data = measured
    broken = subject(model, {"params": jax.tree.map(lambda x: x * jnp.nan, params)}, batch_size=4)
    with pytest.raises(InputError, match="no finite numbers"):
        measure(broken, "text", data)


SUBJECTS = {
    "batch text": (dict(batch_size="x"), "batch_size must be int"),
    "batch None": (dict(batch_size=None), "batch_size must be int"),
    "batch huge": (dict(batch_size=10**8), "batch_size must be at most 65536"),
    "variables None": (dict(variables=None), "variables must be Mapping"),
    "variables empty": (dict(variables={}), 'variables must hold "params"'),
}
MEASURES = {
    "limit text": (dict(limit="x"), "limit must be int"),
    "limit float": (dict(limit=1.5), "limit must be int"),
    "data": (dict(data=3), "data must be str"),
    "task": (dict(task=None), "task must be str"),
}


@pytest.mark.parametrize("name", [*SUBJECTS, *MEASURES])
def test_what_cannot_be_measured_is_one_line(measured, name):
    model, params, data = measured
    changes, message = (SUBJECTS | MEASURES)[name]
    with pytest.raises(InputError, match=message):
        if name in SUBJECTS:
            subject(**{"model": model, "variables": {"params": params}} | changes)
        else:
            measure(**{"subject": subject(model, {"params": params}), "task": "text", "data": data} | changes)


def test_ids_beyond_int32_are_not_scored():
    for request in (Request((1,), (2**40,)), Request((2**40,), (1,)), Request((1,), (-(2**40),))):
        with pytest.raises(InputError, match="beyond int32"):
            likelihoods(lambda rows: pytest.fail("computed"), [request, Request((1,), (V,))], rows=2, max_length=8)
