"""Adapters on small Linen models: recurrence, scans of scans, other collections, methods, conditions, dropout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, adapted
from tests.helpers import jit, long, random_params
from tests.lora.foreign import laws, linen_small
from tests.lora.foreign.linen_models import features, linen_row, pair


@cache
def recurrent():
    gates = {f"LSTMCell_0.{side}{gate}": pair(8 if side == "i" else 6, 6) for side in "ih" for gate in "ifgo"}
    targets = [name.rsplit(".", 1)[-1] for name in gates]
    return linen_row(linen_small.Recurrent(), (features(),), gates, target_modules=targets)


@cache
def stages():
    shapes = {"stages.layers.fc": pair(8, 8, 2, 3)}
    return linen_row(linen_small.Stages(), (features(),), shapes, target_modules="all-linear")


@cache
def inner_axis():
    """The layers are the first axis of every pair, whatever axis of the leaf they are."""
    shapes = {
        "layers.attn.q_einsum": pair(8, 12, 3),
        "layers.attn.kv_einsum": pair(8, 12, 3),
        "layers.attn.attn_vec_einsum": pair(12, 8, 3),
        "layers.mlp.gating_einsum": pair(8, 10, 3, 2),
        "layers.mlp.linear": pair(10, 8, 3),
    }
    return linen_row(linen_small.InnerAxis(), (features(),), shapes, target_modules="all-linear")


@cache
def branches():
    shapes = {"kernel": pair(8, 8), "loop": pair(8, 8)}
    return linen_row(linen_small.Branches(), (features()[:, 0],), shapes, target_modules=["kernel", "loop"])


ROWS = {"recurrent": recurrent, "stages": stages, "inner axis": inner_axis, "branches": branches}


@pytest.mark.parametrize("name", ROWS)
def test_adapters_are_as_the_author_expects(name):
    laws.adapters_are_as_expected(ROWS[name]())


@pytest.mark.parametrize("variant", ["lora", long("dora")])
@pytest.mark.parametrize("name", ROWS)
def test_apply_is_merge(name, variant):
    laws.apply_is_merge(ROWS[name](), variant)


@pytest.mark.parametrize("name", ROWS)
def test_fresh_adapters_change_nothing(name):
    laws.fresh_adapters_change_nothing(ROWS[name]())


@pytest.mark.parametrize("name", ["stages", "branches"])
def test_training_lowers_the_loss(name):
    laws.training_lowers_the_loss(ROWS[name]())


@pytest.mark.parametrize("name", ROWS)
def test_peft_round_trip(name, tmp_path):
    laws.peft_round_trip(ROWS[name](), tmp_path)


def test_one_layer_of_a_stack():
    """Adapters of layer 1 alone: the others are padding, whichever axis the layers are."""
    row = inner_axis()
    adapters = replace(row, spec=replace(row.spec, layers_to_transform=(1,))).fresh()
    for name, one in laws.pairs(adapters).items():
        used = [bool(one["lora_a"][i].any()) for i in range(3)]
        assert used == [False, True, False], name


@cache
def normed():
    model, x = linen_small.Normed(), features()
    variables = model.init(jax.random.key(0), x)
    lora = adapted(model, LoraSpec(rank=2, alpha=3, target_modules=["conv", "out"]))
    params, others = random_params(model, x), {"batch_stats": variables["batch_stats"]}
    adapters = laws.perturbed(lora.init(jax.random.key(1), params, x, variables=others))
    return model, lora, params, adapters, others, x


def both(**kwargs):
    """What ``apply`` gives with these arguments, checked to be what the base with merged parameters gives."""
    model, lora, params, adapters, others, x = normed()
    found = lora.apply({"params": params, "lora": adapters, **others}, x, **kwargs)
    merged = lora.merge(params, adapters, x, variables=others)
    expected = model.apply({"params": merged, **others}, x, **kwargs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert laws.relative_difference(found, expected) < 1e-5
    return found


def test_batch_statistics_are_updated():
    key = {"dropout": jax.random.key(2)}  # one key is the model's and the adapters': their rate is 0
    _, state = both(train=True, mutable=["batch_stats"], rngs=key)
    assert np.abs(state["batch_stats"]["norm"]["mean"]).max() > 0


def test_what_is_sown_comes_back():
    y, state = both(mutable=["intermediates"])
    assert state["intermediates"]["features"][0].shape == (8, 4, 6)


def test_a_method():
    assert both(method="features").shape == (8, 4, 6)
    both(method=linen_small.Normed.features)


def test_a_cache_is_carried_and_products_are_in_bfloat16():
    model, x = linen_small.Cached(), features()[:, 0]
    variables = model.init(jax.random.key(0), x)
    start = {"cache": jax.tree.map(jnp.zeros_like, variables["cache"])}
    lora = adapted(model, LoraSpec(rank=2, alpha=3, target_modules=["kernel"]))
    adapters = lora.init(jax.random.key(1), variables["params"], x, variables=start, mutable=["cache"])
    assert {".".join(path) for path in laws.pairs(adapters)} == {"kernel"}
    adapters = laws.perturbed(adapters)
    merged = lora.merge(variables["params"], adapters)
    found, expected = start, start
    for _ in range(2):
        y, found = lora.apply({"params": variables["params"], "lora": adapters, **found}, x, mutable=["cache"])
        z, expected = model.apply({"params": merged, **expected}, x, mutable=["cache"])
        assert laws.relative_difference(y, z) < 2e-2
    assert laws.relative_difference(found, expected) < 2e-2


def test_gradients_of_each_example():
    row = stages()
    lora, adapters = row.lora(), laws.perturbed(row.fresh())

    def loss(adapters, x):
        return jnp.sum(row.run(lora, row.params, adapters, x[None]) ** 2)

    each = jit(jax.vmap(jax.grad(loss), (None, 0)))(adapters, *row.args)
    total = jit(jax.grad(lambda adapters, x: jnp.sum(row.run(lora, row.params, adapters, x) ** 2)))(adapters, *row.args)
    assert laws.relative_difference(jax.tree.map(lambda g: g.sum(0), each), total) < 1e-5


@pytest.mark.parametrize("name", ["recurrent", "stages", "branches"])
def test_dropout_is_on_the_low_rank_path_alone(name):
    """It acts with a key, depends on the key, and with B = 0 changes nothing."""
    row = ROWS[name]()
    lora, fresh = row.lora(dropout=0.5), row.fresh(dropout=0.5)

    @jit
    def run(adapters, key):
        return lora.apply({"params": row.params, "lora": adapters}, *row.args, rngs={"dropout": key})

    keys = jax.random.split(jax.random.key(0), 8)
    base = jit(row.base)(row.params, *row.args)
    assert laws.relative_difference(run(fresh, keys[0]), base) < 1e-6
    adapters = laws.perturbed(fresh, size=0.02)
    first, again, second = (run(adapters, key) for key in (keys[0], keys[0], keys[1]))
    plain = jit(lambda adapters: row.run(row.lora(), row.params, adapters, *row.args))(adapters)
    assert laws.relative_difference(first, again) == 0
    assert laws.relative_difference(first, second) > 1e-4
    assert laws.relative_difference(first, plain) > 1e-4


def test_masks_of_layers_differ():
    """In a scan of scans every layer has a mask of its own: an input is kept by some of the six layers."""
    row, small = stages(), 1e-3
    lora, adapters = row.lora(dropout=0.5), row.fresh(dropout=0.5)
    pair = {"lora_a": jnp.eye(8)[:, :2], "lora_b": small * jnp.eye(8)[:2]}  # of inputs 0 and 1
    adapters = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.broadcast_to(pair[path[-1].key], leaf.shape), adapters
    )
    params, (x,) = jax.tree.map(jnp.zeros_like, row.params), row.args
    y = jit(lora.apply)({"params": params, "lora": adapters}, x, rngs={"dropout": jax.random.key(3)})
    times = (y - x)[..., :2] / (small * row.spec.alpha / row.spec.rank * 2 * jnp.tanh(x[..., :2]))
    assert set(np.unique(np.round(np.asarray(times)))) >= {1, 2, 3, 4, 5}
