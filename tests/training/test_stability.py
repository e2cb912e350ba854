"""The stability terms against what each module sees and does, for any model, with pads, and over eight devices."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, merge, shrink_until_stable, stable_lora
from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.pairs import pairs
from stablelora_jax.lora.target_modules import from_matrix, kernel_axes
from stablelora_jax.training.stability import by_name, shrunk_adapters, stability
from stablelora_jax.utils import tree
from tests.helpers import FOREIGN, ForeignScan, random_params, tiny_decoder, tokens, trained

DECODER = LoraSpec(
    target_modules="all-linear",
    rank=3,
    rank_pattern={"layers.1.self_attn.q_proj": 1},
    alpha_pattern={"down_proj": 3},
    exclude_modules=["layers.2.mlp.up_proj"],
)
FIELDS = ("delta1", "delta2", "delta3", "shrink")


def case(name):
    """``(model, params, inputs, spec)`` of one row of the table."""
    if name == "decoder":
        model, params = tiny_decoder(qkv_bias=True)
        return model, params, tokens(2), DECODER
    model, shape, spec = FOREIGN[name]
    x = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
    return model, random_params(model, x), x, spec


def some_step(params, spec, dtype=jnp.float32):
    """Adapters before a step, as shrunk in it and after it, all random and of different sizes."""
    start = init_adapters(jax.random.key(0), params, spec, dtype=dtype)
    before = trained(start, spec)
    shrunk = jax.tree.map(lambda x: x, before)
    for path, pair in pairs(before).items():
        shrunk = tree.set_in(shrunk, path, {**pair, "lora_a": 0.7 * pair["lora_a"]})
    after = jax.tree.map(lambda x, u: x + u, shrunk, trained(start, spec, seed=6, size=0.05))
    return before, shrunk, after


def seen(model, params, paths, *inputs):
    """``[(module, kernel, x)]``: what each call of a module at ``paths`` was given, from inside any scan or remat."""
    calls = []

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and module.path in paths and isinstance(module, nn.Module):
            bare, path = module.clone(parent=None, name=None), module.path
            note = lambda kernel, x: calls.append((path, bare, np.asarray(kernel), np.asarray(x)))
            jax.debug.callback(note, module.variables["params"]["kernel"], args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
        jax.block_until_ready(model.apply({"params": params}, *inputs))
    jax.effects_barrier()
    return calls


def direct(model, params, spec, before, shrunk, after, *inputs, mask=None):
    """The terms by name, each as the output of the bare module whose kernel is one product, on what it was given."""
    merged, expected = merge(params, before, spec), {}
    targets = adapter_target_modules(before, spec)
    calls = seen(model, merged, targets, *inputs)
    for path, target in targets.items():
        depth, in_axes = kernel_axes(path, tree.get_in(params, path), spec)
        kernels = np.asarray(tree.get_in(merged, path)["kernel"])
        flat = kernels.reshape(-1, *kernels.shape[depth:])
        for i, (name, rank, scale) in enumerate(zip(target.names, target.ranks, target.scales, strict=True)):
            if not rank:
                continue
            (a, b), (small, _), (new_a, new_b) = (matrices(t, path, i) for t in (before, shrunk, after))
            products = (small @ (new_b - b), (new_a - small) @ b, (new_a - small) @ (new_b - b), (small - a) @ b)
            mine = [(m, x) for p, m, kernel, x in calls if p == path and np.array_equal(kernel, flat[i])]
            assert mine, name
            values = [rms(mine, from_matrix(scale * jnp.asarray(p), flat[i].shape, 0, in_axes), mask) for p in products]
            norms = (np.linalg.norm(new_a) / len(a), np.linalg.norm(new_b) / b.shape[1])
            expected[name] = dict(zip((*FIELDS, "a", "b"), (*values, *norms), strict=True))
    return expected


def matrices(adapters, path, i):
    pair = tree.get_in(adapters, path)
    return tuple(np.asarray(pair[f"lora_{x}"], np.float64).reshape(-1, *pair[f"lora_{x}"].shape[-2:])[i] for x in "ab")


def rms(calls, kernel, mask):
    squares, count = 0.0, 0
    for module, x in calls:
        bare = module.clone(use_bias=False)
        y = np.asarray(bare.apply({"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}, x), np.float64)
        y = y if mask is None else y[np.asarray(mask) != 0]
        squares, count = squares + (y**2).sum(), count + y.size
    return (squares / count) ** 0.5


@partial(jax.jit, static_argnums=(0, 2), static_argnames="axis_name")
def measured(model, params, spec, before, shrunk, after, x, mask=None, axis_name=None):
    variables = {"params": params, "lora": before}
    return stability(adapted(model, spec), variables, shrunk, after, x, token_mask=mask, axis_name=axis_name)


def assert_same(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, terms in expected.items():
        for field, value in terms.items():
            np.testing.assert_allclose(found[name][field], value, rtol, 1e-12, err_msg=f"{name} {field}")


@pytest.mark.parametrize("name", ["decoder", *FOREIGN])
def test_terms_are_what_each_module_does_with_what_it_sees(name):
    model, params, x, spec = case(name)
    step = some_step(params, spec)
    view = measured(model, params, spec, *step, x)
    assert_same(by_name(view, spec), direct(model, params, spec, *step, x))
    for path, target in adapter_target_modules(step[0], spec).items():
        assert {np.shape(values) for values in view[path]} == {target.stack}
        unused = np.array(target.ranks).reshape(target.stack) == 0
        assert not any(np.asarray(values)[unused].any() for values in view[path]), "padding measures zero"


@pytest.mark.parametrize("name", ["decoder", "scan", "scan_remat", "dense"])
def test_pads_do_not_count(name):
    model, params, x, spec = case(name)
    step, mask = some_step(params, spec), np.ones(x.shape[:2], np.int32)
    mask[0, 3:] = 0
    found = by_name(measured(model, params, spec, *step, x, mask=mask), spec)
    assert_same(found, direct(model, params, spec, *step, x, mask=mask))
    other = x.at[0, 3:].set(x[1, 3:] * 0 + (7 if name == "decoder" else 50))
    assert_same(found, by_name(measured(model, params, spec, *step, other, mask=mask), spec), 1e-5)
    unmasked = by_name(measured(model, params, spec, *step, other), spec)
    assert any(abs(unmasked[n]["delta1"] / found[n]["delta1"] - 1) > 1e-2 for n in found)


def test_a_mask_leaves_modules_alone_that_see_other_axes():
    model, params, x, spec = case("conv_einsum")  # the convolution halves T
    step = some_step(params, spec)
    with_mask = measured(model, params, spec, *step, x, mask=np.zeros(x.shape[:2], np.int32))
    assert_same(by_name(with_mask, spec), by_name(measured(model, params, spec, *step, x), spec), 1e-6)


def test_the_terms_add_up_to_the_change_of_the_output():
    """One token, one output, nothing negative but the shrink: each RMS is the term itself, up to that sign."""
    rng = np.random.default_rng(0)
    model, spec, x = (
        nn.Dense(1),
        LoraSpec(rank=3, target_modules="all-linear"),
        jnp.asarray(rng.uniform(size=(1, 1, 6))),
    )
    params = random_params(model, x)
    pair = lambda: {"lora_a": jnp.asarray(rng.uniform(size=(6, 3))), "lora_b": jnp.asarray(rng.uniform(size=(3, 1)))}
    before, step = pair(), pair()
    shrunk = {**before, "lora_a": 0.9 * before["lora_a"]}
    after = jax.tree.map(jnp.add, shrunk, step)
    (terms,) = measured(model, params, spec, before, shrunk, after, x).values()
    outputs = [model.apply({"params": merge(params, adapters, spec)}, x).item() for adapters in (before, after)]
    total = terms.delta1 + terms.delta2 + terms.delta3 - terms.shrink
    np.testing.assert_allclose(total, outputs[1] - outputs[0], rtol=1e-5)
    assert min(terms) > 1e-3


@pytest.mark.parametrize("term", FIELDS)
def test_each_term_alone_is_the_change_of_the_output(term):
    """Steps of which all terms but one vanish, with signs at random."""
    x, model, spec = (
        jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6))),
        nn.Dense(4),
        LoraSpec(rank=2, target_modules="all-linear"),
    )
    params = random_params(model, x)
    before, shrunk, after = some_step(params, spec)
    zero, a, b = (lambda k: jnp.zeros_like(before[k])), before["lora_a"], before["lora_b"]
    before, shrunk, after = {
        "delta1": (before, before, {**after, "lora_a": a}),
        "delta2": (before, before, {**after, "lora_b": b}),
        "delta3": (before | {"lora_b": zero("lora_b")}, before | {"lora_a": zero("lora_a")}, after),
        "shrink": (before, shrunk, shrunk),
    }[term]
    (terms,) = measured(model, params, spec, before, shrunk, after, x).values()
    outputs = [model.apply({"params": merge(params, adapters, spec)}, x) for adapters in (before, after)]
    np.testing.assert_allclose(getattr(terms, term), jnp.sqrt(jnp.square(outputs[1] - outputs[0]).mean()), rtol=1e-4)
    assert getattr(terms, term) > 1e-3 and all(getattr(terms, other) < 1e-7 for other in set(FIELDS) - {term})


class Twice(nn.Module):
    """One module called twice, its first output twice as long as its second; and one that no gradient leaves."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(6, name="shared")
        y = shared(jnp.concatenate([x, 3 * x], axis=1))
        return shared(nn.tanh(y[:, : x.shape[1]])), jax.lax.stop_gradient(nn.Dense(3, name="lost")(y))


def test_calls_of_one_module_add_up_and_what_reaches_no_output_is_zero():
    x, spec = (
        jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6)), jnp.float32),
        LoraSpec(target_modules="all-linear"),
    )
    params = random_params(Twice(), x)
    step = some_step(params, spec)
    found = by_name(measured(Twice(), params, spec, *step, x), spec)
    expected = direct(Twice(), params, spec, *step, x)
    assert_same({"shared": found["shared"]}, {"shared": expected["shared"]})
    assert [found["lost"][field] for field in FIELDS] == [0, 0, 0, 0]


@pytest.mark.long
@pytest.mark.parametrize("model", ["decoder", "scan_remat"])
def test_eight_devices_equal_one(model):
    model, params, x, spec = case(model)
    x = jnp.concatenate([x + i if x.dtype == jnp.int32 else x * (i + 1) for i in range(4)]) % 31
    step, mask = some_step(params, spec), np.ones(x.shape[:2], np.int32)
    mask[1, 2:], mask[5, 1:] = 0, 0  # the devices hold unequal numbers of tokens

    split = lambda x: x.reshape(8, 1, *x.shape[1:])
    view = lambda x, mask: measured(model, params, spec, *step, x, mask, axis_name="data")
    eight = jax.pmap(view, axis_name="data")(split(x), split(mask))
    assert jax.local_device_count() == 8
    one = by_name(measured(model, params, spec, *step, x, mask=mask), spec)
    for i in (0, 7):
        assert_same(by_name(jax.tree.map(lambda y, i=i: y[i], eight), spec), one)


def test_a_and_its_latch_decide_what_was_shrunk():
    """With learning rate 0 all that moves is what shrinks: A' is then A after the step, to the last bit."""
    params, spec = (
        random_params(ForeignScan(), jnp.ones((2, 5, 6))),
        LoraSpec(target_modules=["fc"], stacked=("blocks",)),
    )
    before = trained(init_adapters(jax.random.key(0), params, spec), spec)
    pair = before["blocks"]["fc"]
    pair["lora_b"] = pair["lora_b"].at[0].multiply(1e-3).at[2].multiply(100.0)  # layer 2 is stable at once
    tx = optax.chain(optax.clip(1.0), shrink_until_stable(optax.sgd(0.0), 0.01))
    updates, state = tx.update(before, tx.init(before), before)
    after = optax.apply_updates(before, updates)
    shrunk = shrunk_adapters(before, state, 0.01)
    moved = np.abs(np.asarray(after["blocks"]["fc"]["lora_a"] - pair["lora_a"])).max(axis=(1, 2)) > 0
    assert moved[0] and not moved[2]
    np.testing.assert_allclose(shrunk["blocks"]["fc"]["lora_a"], after["blocks"]["fc"]["lora_a"], rtol=1e-7)
    terms = measured(ForeignScan(), params, spec, before, shrunk, after, jnp.ones((2, 5, 6)))["blocks", "fc"]
    assert np.array_equal(np.asarray(terms.shrink) > 1e-5, moved)
    assert not terms.delta1.any() and not terms.delta3.any() and float(terms.delta2.max()) < 1e-6
    adam = optax.adamw(1e-3)
    for same in (shrunk_adapters(before, state, None), shrunk_adapters(before, adam.init(before), 0.01)):
        assert all(x is y for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(before), strict=True))


def test_adamw_by_hand():
    """Any optimizer: at the first step B = 0, so that delta2 is zero and only weight decay moves A."""
    model, params, x, spec = case("scan")
    before, tx = init_adapters(jax.random.key(0), params, spec), optax.adamw(1e-2)
    cost = lambda adapters: jnp.square(adapted(model, spec).apply({"params": params, "lora": adapters}, x)).mean()
    updates, state = tx.update(jax.grad(cost)(before), tx.init(before), before)
    after = optax.apply_updates(before, updates)
    step = before, shrunk_adapters(before, state, None), after
    found = by_name(measured(model, params, spec, *step, x), spec)
    assert_same(found, direct(model, params, spec, *step, x))
    assert all(t["delta1"] > 1e-3 and t["delta2"] == t["shrink"] == 0 for t in found.values())
    assert all(0 < t["delta3"] < 1e-4 * t["delta1"] for t in found.values())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes(dtype, request):
    if dtype == jnp.float64:
        request.getfixturevalue("x64")
    model, params, x, spec = case("scan_remat")
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
    step = some_step(params, spec, jnp.promote_types(dtype, jnp.float32))
    view = measured(model, params, spec, *step, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(view)} == {jnp.promote_types(dtype, jnp.float32)}
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, *step, x))
    single = by_name(measured(model, single[0], spec, *single[1:]), spec)
    assert_same(by_name(view, spec), single, 0.1 if dtype == jnp.bfloat16 else 1e-4)


def test_adapters_that_are_not_of_one_step_are_refused():
    model, params, x, spec = case("dense")
    before, shrunk, after = some_step(params, spec)
    with pytest.raises(InputError, match="not pairs of the same shapes"):
        measured(model, params, spec, before, shrunk, {"split": after["split"]}, x)


def test_the_ratio_may_be_a_schedule_or_traced():
    schedule = optax.linear_schedule(0.1, 0.2, 2)
    before = {"p": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 4))}}
    tx = stable_lora(1e-3, shrink_ratio=schedule)
    state = tx.init(before)
    for step in range(2):
        _, state = tx.update(before, state, before)
        ratio = float(schedule(step))
        for given in (schedule, ratio):
            shrunk = jax.jit(lambda s, given=given: shrunk_adapters(before, s, given))(state)
            np.testing.assert_allclose(shrunk["p"]["lora_a"], 1 - ratio, rtol=1e-6)
    traced = jax.jit(lambda s, r: shrunk_adapters(before, s, r))(state, 0.3)
    np.testing.assert_allclose(traced["p"]["lora_a"], 0.7, rtol=1e-6)
