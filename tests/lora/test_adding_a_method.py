"""The parametrisation that docs/adding-a-method.md adds, as printed, under the laws of the axis."""

import re
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, adapted, describe, init_adapters, merge, to_lora
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from tests.conftest import ROOT
from tests.helpers import largest_difference, tiny_decoder, tokens
from tests.lora import test_parametrizations as laws

PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()


@pytest.fixture
def diagonal(monkeypatch):
    """The member that the page adds and its row, as if both were there; the name that a spec takes."""
    member, row = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len((member + row).splitlines()) < 40
    module, tests = ModuleType("diagonal"), ModuleType("tests")
    exec(compile(member, "docs/adding-a-method.md", "exec"), vars(module))
    exec(compile(row, "docs/adding-a-method.md", "exec"), vars(tests))
    [(name, found)] = tests.MEMBERS.items()
    monkeypatch.setitem(PARAMETRIZATIONS, name, module)
    monkeypatch.setitem(laws.MEMBERS, name, found)
    return name


def test_it_obeys_the_laws(diagonal, x64):
    for size in ((laws.IN, laws.OUT), (laws.OUT, laws.IN)):
        laws.test_path_equals_merging_equals_the_transcription(diagonal, size, None)
    laws.test_gradients_reach_what_is_trained_alone_and_are_finite_differences(diagonal, None)


def test_the_path_of_a_decoder_is_merging(diagonal):
    model, params = tiny_decoder()
    spec = LoraSpec(rank=4, target_modules=["q_proj", "down_proj"], parametrization=diagonal, init="svd")
    start = init_adapters(jax.random.key(0), params, spec)
    assert largest_difference(merge(params, start, spec), params) < 1e-6
    assert f"trainable params: {3 * 2 * 4} ||" in describe(params, start, spec)

    adapters = laws.moved(start)
    merged = merge(params, adapters, spec)
    found = adapted(model, spec).apply({"params": params, "lora": adapters}, tokens())
    np.testing.assert_allclose(found, model.apply({"params": merged}, tokens()), atol=1e-4)
    assert not jnp.allclose(found, model.apply({"params": params}, tokens()), atol=1e-3)
    plain, plain_spec = to_lora(adapters, spec, params=params)
    assert plain_spec.parametrization == "lora"
    assert largest_difference(merge(params, plain, plain_spec), merged) < 1e-5
