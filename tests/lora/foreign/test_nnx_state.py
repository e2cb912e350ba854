"""NNX in particular: ``nnx.jit``, state that is no parameter, adapters as an ``nnx.State``, modules by their names."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stablelora_jax import InputError, LoraSpec, adapted, describe, init_adapters, merge
from tests.helpers import jit
from tests.lora.foreign import laws
from tests.lora.foreign.laws import perturbed, relative_difference
from tests.lora.foreign.nnx_layers import Cache
from tests.lora.foreign.nnx_models import Llama, Qwen3
from tests.lora.foreign.nnx_rows import TOKENS, R, Two, llama, noisy, pair, qwen3_of_some_layers, row, x


def snapshot(model):
    """Everything in a module: its structure, and the values of all variables, which must not be tracers."""
    graphdef, state = nnx.split(model)
    leaves = jax.tree.leaves(state)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return graphdef, [np.asarray(raw(leaf)) for leaf in leaves]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_module_is_unchanged(train):
    """Running statistics and counters of keys are read from the module and never written into it."""
    found = noisy()
    found.model.train() if train else found.model.eval()
    found = row(found.model, found.args, found.shapes)
    before = snapshot(found.model)
    laws.adapters_are_as_expected(found)
    laws.apply_is_merge(found, "lora")
    lora, adapters = found.lora(), perturbed(found.fresh())
    again = [found.run(lora, found.params, adapters, *found.args) for _ in range(2)]
    assert relative_difference(*again) == 0
    str(lora.describe(found.params, *found.args))
    after = snapshot(found.model)
    assert after[0] == before[0]
    assert all((a == b).all() for a, b in zip(after[1], before[1], strict=True))


def test_running_statistics():
    """``mutable=True`` gives the state that is no parameter, too, and ``rest`` takes it: the module's own behaviour."""
    found = noisy()
    lora, adapters = found.lora(), perturbed(found.fresh())
    variables = {"params": found.params, "lora": adapters}
    run = jit(lambda variables: lora.apply(variables, *found.args, mutable=True))
    first, rest = run(variables)
    second, rest = run({**variables, "rest": rest})
    model = nnx.clone(found.model)
    nnx.update(model, lora.merge(found.params, adapters))
    assert relative_difference((first, second), (model(*found.args), model(*found.args))) < 1e-5
    assert relative_difference(first, second) > 1e-3, "the keys of dropout have not moved"
    assert relative_difference(rest.norm, nnx.state(model.norm, nnx.BatchStat)) < 1e-5


def test_methods_by_name():
    """``method`` is a name of the module's."""
    model = nnx.Embed(23, 6, rngs=nnx.Rngs(0))
    lora = adapted(model, LoraSpec(target_modules=["embedding"], rank=R))
    params, queries = nnx.state(model, nnx.Param), x(5, 6)
    adapters = perturbed(lora.init(jax.random.key(0), params, TOKENS))
    y = lora.apply({"params": params, "lora": adapters}, queries, method="attend")
    nnx.update(model, lora.merge(params, adapters))
    assert relative_difference(y, model.attend(queries)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"modules_to_save": ("second",), "bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}],
    ids=["saved", "biases", "lora_bias"],
)
def test_trained_in_full(changes):
    """Parameters that are trained beside the pairs."""
    found = row(Two(rngs=nnx.Rngs(0)), (x(6),), {}, ["first"], **changes)
    lora, adapters = found.lora(), found.fresh()
    adapters = jax.tree.map(
        lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), adapters
    )
    value = lambda run: partial(laws.value_and_gradient, run)
    got = value(lambda a: found.run(lora, found.params, a, *found.args))(adapters)
    want = value(lambda a: found.base(lora.merge(found.params, a), *found.args))(adapters)
    assert relative_difference(got, want) < 1e-5


def test_plain_dicts_as_parameters():
    """``nnx.to_pure_dict`` of the state is the same model, and merging gives such a dict."""
    found = llama()
    plain, lora = nnx.to_pure_dict(found.params), found.lora()
    adapters = perturbed(lora.init(jax.random.key(3), plain, TOKENS))
    y = lora.apply({"params": plain, "lora": adapters}, TOKENS)
    assert relative_difference(y, found.run(lora, found.params, adapters, TOKENS)) < 1e-6
    assert jax.tree.structure(lora.merge(plain, adapters)) == jax.tree.structure(plain)


def test_under_nnx_jit():
    """The module may be an argument of ``nnx.jit``, and what is adapted there is its traced state."""
    found = llama()
    adapters = perturbed(found.fresh())

    @nnx.jit
    def step(model, adapters, tokens):
        lora = adapted(model, found.spec)
        loss = lambda a: lora.apply({"params": nnx.state(model, nnx.Param), "lora": a}, tokens).sum()
        return jax.value_and_grad(loss)(adapters)

    before = snapshot(found.model)
    value, gradient = step(found.model, adapters, TOKENS)
    plain = jit(jax.value_and_grad(lambda a: found.run(found.lora(), found.params, a, TOKENS).sum()))
    assert relative_difference((value, gradient), plain(adapters)) < 1e-4
    assert all((a == b).all() for a, b in zip(snapshot(found.model)[1], before[1], strict=True))


def test_adapters_as_a_state():
    """``lora.state(adapters)`` is an ``nnx.State`` of ``nnx.LoRAParam``, which apply, merge and ``jax.grad`` take."""
    found = qwen3_of_some_layers()
    lora, adapters = found.lora(), perturbed(found.fresh())
    state = lora.state(adapters)
    assert isinstance(state, nnx.State)
    variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert variables and all(isinstance(variable, nnx.LoRAParam) for variable in variables)
    assert nnx.to_pure_dict(state).keys() == adapters.keys()

    def loss(a):
        return found.run(lora, found.params, a, TOKENS).sum()

    (y, gradient), (plain, plain_gradient) = (jit(jax.value_and_grad(loss))(a) for a in (state, adapters))
    assert y == plain
    assert isinstance(gradient, nnx.State)
    assert relative_difference(nnx.to_pure_dict(gradient), plain_gradient) == 0
    merged = lora.merge(found.params, state)
    assert relative_difference(merged, lora.merge(found.params, adapters)) == 0


@pytest.mark.parametrize("whole", [False, True], ids=["state", "module"])
def test_functions_by_names(whole):
    """``init_adapters``, ``merge`` and ``describe`` find kernels by their names, in a state or a module, too."""
    model = Two(rngs=nnx.Rngs(0))
    found = row(model, (x(6),), {"first": pair(6, 8), "second": pair(8, 4)})
    given, key = model if whole else found.params, jax.random.key(3)
    adapters = init_adapters(key, given, found.spec)
    assert relative_difference(adapters, found.fresh()) == 0
    assert jax.tree.structure(adapters) == jax.tree.structure(found.fresh())
    adapters = perturbed(adapters)
    merged = merge(given, adapters, found.spec)
    y = merged(x(6)) if isinstance(merged, nnx.Module) else found.base(merged, x(6))
    assert relative_difference(y, found.run(found.lora(), found.params, adapters, x(6))) < 1e-5
    assert relative_difference(nnx.state(model, nnx.Param), found.params) == 0
    assert "first" in describe(given, adapters, found.spec)


def test_cache_is_an_output():
    """A model that writes into a cache of ``nnx.Cache`` variables: a function that takes it and returns it."""
    model = Qwen3(rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def fn(params, tokens, cache):
        cache = jax.tree.map(lambda leaf: leaf, cache)
        return nnx.merge(graphdef, params)(tokens, cache), cache

    lora = adapted(fn, LoraSpec(target_modules="all-linear", rank=R))
    cache = [Cache(8, 8) for _ in range(2)]
    adapters = perturbed(lora.init(jax.random.key(0), params, TOKENS, cache))
    run = jit(lambda tokens, cache: lora.apply({"params": params, "lora": adapters}, tokens, cache))
    first, written = run(TOKENS[:, :3], cache)
    last, _ = run(TOKENS[:, 3:], written)
    whole = nnx.merge(graphdef, lora.merge(params, adapters))(TOKENS)
    assert relative_difference(jnp.concatenate([first, last], 1), whole) < 1e-4
    assert int(cache[0].position[...]) == 0 and int(written[0].position[...]) == 3


def test_describe_names_every_leaf():
    """Each leaf that could be adapted, by name."""
    found = llama()
    text = str(found.lora().describe(found.params, TOKENS))
    for name in ("layers.0.q_proj", "layers.1.kv_proj", "input_embedding", "layers.0.mlp.down_proj"):
        assert name in text


@pytest.mark.parametrize(
    ("targets", "words"),
    [(["qproj"], "qproj"), (["input_layernorm"], "input_layernorm"), (["rope"], "rope")],
)
def test_pattern_that_matches_nothing(targets, words):
    with pytest.raises(InputError, match=words) as error:
        row(Llama(rngs=nnx.Rngs(0)), (TOKENS,), {}, targets).fresh()
    assert "\n" not in str(error.value)


def test_adapters_of_another_model():
    """One line that names a pair and says what to do."""
    found, other = llama(), noisy().fresh()
    with pytest.raises(InputError, match=r"\b(fc|out|layers\.\d\.\w+_proj)\b") as error:
        found.run(found.lora(), found.params, other, TOKENS)
    assert "\n" not in str(error.value)
