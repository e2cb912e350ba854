"""The low-rank path equals merging: values and gradients, any Linen model, under jit, remat, scan and many devices."""

import functools
from dataclasses import replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, lora_hyperparams, merge
from tests.helpers import (
    FOREIGN,
    ForeignConv,
    ForeignMLP,
    ForeignScan,
    ForeignTied,
    jit,
    largest_difference,
    random_params,
    tiny_decoder,
    tokens,
    trained,
)

DECODER = {
    "default": LoraSpec(),
    "layers_differ": LoraSpec(
        target_modules="all-linear",
        rank=4,
        rank_pattern={"layers.1.self_attn.q_proj": 1, "down_proj": 3},
        alpha_pattern={"layers.[02].*v_proj": 3},
        exclude_modules=["layers.2.mlp.up_proj"],
        scaling="rslora",
    ),
    "some_layers_and_head": LoraSpec(target_modules=["o_proj", "lm_head"], layers_to_transform=None, rank=2),
    "one_layer": LoraSpec(target_modules=["k_proj"], layers_to_transform=(1,), rank=2),
}


def decoder_case(name, **changes):
    model, params = tiny_decoder(qkv_bias=True, o_bias=True, mlp_bias=True, **changes)
    return model, params, tokens(8), DECODER[name]


def foreign_case(name):
    model, shape, spec = FOREIGN[name]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(8, *shape[1:])), jnp.float32)
    return model, random_params(model, x), x, spec


def foreign_dora(name):
    model, params, x, spec = foreign_case(name)
    return model, params, x, replace(spec, parametrization="dora")


def foreign_tied(parametrization):
    x = tokens(8, vocab=9)
    return (
        ForeignTied(),
        random_params(ForeignTied(), x),
        x,
        LoraSpec(target_modules=["embed", "fc"], rank=2, parametrization=parametrization),
    )


DECODER |= {
    "dora": replace(DECODER["layers_differ"], parametrization="dora"),
    "embedding": LoraSpec(target_modules=["embed_tokens", "lm_head", "v_proj"], rank=2),
    "dora_embedding": LoraSpec(target_modules=["embed_tokens", "q_proj"], rank=2, parametrization="dora"),
    "full": LoraSpec(
        rank=2,
        target_modules=["q_proj", "k_proj"],
        modules_to_save=["lm_head", "embed_tokens", "layers.1.mlp", "norm", "input_layernorm", "k_proj"],
        bias="lora_only",
    ),
    "bias": LoraSpec(rank=2, bias="all"),
    "lora_bias": LoraSpec(
        rank=2, lora_bias=True, target_modules=["q_proj", "gate_proj"], layers_to_transform=(0, 2), bias="lora_only"
    ),
}
CASES = {f"decoder-{name}": partial(decoder_case, name) for name in DECODER}
CASES |= {name: partial(foreign_case, name) for name in FOREIGN}
CASES |= {f"dora-{name}": partial(foreign_dora, name) for name in FOREIGN if name not in ("scan", "dense")}
CASES |= {f"tied-{name}": partial(foreign_tied, name) for name in ("lora", "dora")}


@functools.cache
def base_output(kind):
    """Of the base that all cases of a kind share."""
    model, params, x, _ = CASES[kind]()
    return jit(model.apply)({"params": params}, x)


def both(case):
    """``(path, merged)``: two functions of the adapters, and trained adapters, for one case of the table."""
    model, params, x, spec = CASES[case]()
    start = init_adapters(jax.random.key(0), params, spec)
    path = lambda adapters: adapted(model, spec).apply({"params": params, "lora": adapters}, x)
    by_merging = lambda adapters: model.apply({"params": merge(params, adapters, spec)}, x)
    kind = {"decoder": "decoder-default", "tied": "tied-lora", "dora": case.removeprefix("dora-")}
    return path, by_merging, start, trained(start, spec), base_output(kind.get(case.split("-")[0], case))


@pytest.mark.parametrize("case", CASES)
def test_path_equals_merging_in_values_and_gradients(case):
    path, by_merging, start, adapters, base = both(case)
    cost = lambda function: lambda a: (jnp.square(y := function(a)).mean(), y)
    gradient, y = jit(jax.grad(cost(path), has_aux=True))(adapters)
    expected_gradient, expected = jit(jax.grad(cost(by_merging), has_aux=True))(adapters)
    tolerance = 1e-4 if case.startswith("decoder") else 1e-5
    assert largest_difference(y, expected) < tolerance
    assert largest_difference(y, base) > 100 * tolerance, "the adapters must change the output"
    assert largest_difference(gradient, expected_gradient) < 1e-4


SHORT = ("decoder-default", "decoder-layers_differ", "decoder-full", "dense", "scan", "attention", "conv_einsum")


@pytest.mark.parametrize(
    "case",
    [c if c in SHORT else pytest.param(c, marks=pytest.mark.long) for c in CASES if "dora" not in c],
)
def test_step_zero_is_the_base_to_the_last_bit(case):
    model, params, x, spec = CASES[case]()
    low_rank = {"params": params, "lora": init_adapters(jax.random.key(0), params, spec)}
    path = adapted(model, spec).apply
    if case in ("decoder-default", *FOREIGN):  # another spec changes nothing about operations one by one
        assert np.array_equal(path(low_rank, x), model.apply({"params": params}, x))
    compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})  # as users compile
    assert np.array_equal(compiled(path)(low_rank, x), compiled(model.apply)({"params": params}, x))


def test_gradients_of_padding_are_exactly_zero():
    path, _, start, adapters, _ = both("decoder-layers_differ")
    gradient = jit(jax.grad(lambda a: jnp.square(path(a)).mean()))(adapters)
    unused = jax.tree.map(lambda value, g: jnp.where(value == 0, g, 0), adapters, gradient)
    assert not any(leaf.any() for leaf in jax.tree.leaves(unused))
    assert any((leaf == 0).any() for leaf in jax.tree.leaves(adapters))


@pytest.mark.parametrize("case", ["decoder-layers_differ", "scan_layers"])
def test_eight_devices_equal_one(case):
    model, params, x, spec = CASES[case]()
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    apply = lambda x: adapted(model, spec).apply({"params": params, "lora": adapters}, x)
    expected = jax.jit(apply)(x)
    mapped = jax.pmap(apply)(x.reshape(8, 1, *x.shape[1:])).reshape(expected.shape)
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    assert len(jax.devices()) == 8
    assert largest_difference(mapped, expected) < 1e-5
    assert largest_difference(jax.jit(apply)(jax.device_put(x, rows)), expected) < 1e-5


def test_float64_throughout(x64):
    model, params = tiny_decoder(dtype=jnp.float64)
    spec = DECODER["layers_differ"]
    adapters = trained(init_adapters(jax.random.key(0), params, spec, dtype=jnp.float64), spec)
    y = jit(adapted(model, spec).apply)({"params": params, "lora": adapters}, tokens())
    assert y.dtype == jnp.float64
    merged = jit(lambda a: model.apply({"params": merge(params, a, spec)}, tokens()))(adapters)
    assert largest_difference(y, merged) < 1e-12


def test_bfloat16_base_keeps_its_dtypes_and_adds_in_float32():
    model, params = tiny_decoder(dtype=jnp.bfloat16)
    spec = LoraSpec(target_modules="all-linear")
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    low_rank = lambda a: adapted(model, spec).apply({"params": params, "lora": a}, tokens())
    grads, found = jit(jax.grad(lambda a: ((y := low_rank(a)).sum(), y), has_aux=True))(adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)} and found.dtype == jnp.float32
    merged = jit(lambda a: model.apply({"params": merge(params, a, spec)}, tokens()))(adapters)
    assert largest_difference(found, merged) < 0.1


def test_without_adapters_it_is_the_base():
    model, params, x, spec = CASES["decoder-default"]()
    assert np.array_equal(adapted(model, spec).apply({"params": params}, x), model.apply({"params": params}, x))


def test_strict_dtype_promotion():
    model, params, x, spec = CASES["decoder-layers_differ"]()
    adapters = init_adapters(jax.random.key(0), params, spec)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda a: adapted(model, spec).apply({"params": params, "lora": a}, x), adapters)
        jax.eval_shape(lambda a: merge(params, a, spec), adapters)


class Unread(nn.Module):
    """A kernel that no Linen layer reads."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
        return nn.Dense(2, name="fc")(x @ kernel)


class Hand(nn.Module):
    """Holds :class:`Unread` so that it has a name."""

    @nn.compact
    def __call__(self, x):
        return Unread(name="own")(x)


def test_an_adapter_that_nothing_reads_is_an_error():
    x = jnp.ones((2, 4))
    params = random_params(Hand(), x)
    params["idle"] = {"kernel": jnp.ones((4, 4))}
    spec = LoraSpec(target_modules=["idle"])
    adapters = init_adapters(jax.random.key(0), params, spec)
    with pytest.raises(InputError, match="read the adapters at idle"):
        adapted(Hand(), spec).apply({"params": params, "lora": adapters}, x)
    with pytest.raises(InputError, match="idle is never multiplied with an activation"):
        adapted(Hand(), spec).init(jax.random.key(0), params, x)


def test_a_module_of_ones_own_is_read_by_its_computation():
    x = jnp.ones((2, 4))
    params = random_params(Hand(), x)
    spec = LoraSpec(target_modules=["own"])
    adapters = init_adapters(jax.random.key(0), params, spec)
    changed = trained(adapters, spec)
    expected = Hand().apply({"params": merge(params, changed, spec)}, x)
    found = adapted(Hand(), spec).apply({"params": params, "lora": changed}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_wrong_guess_of_contracted_axes_is_an_error_with_the_way_out():
    x = jnp.ones((2, 8, 5))
    params = random_params(ForeignConv(), x)
    spec = LoraSpec(target_modules=["mix"], in_axes={"mix": (0, 1)}, rank=2)
    adapters = init_adapters(jax.random.key(0), params, spec)
    with pytest.raises(InputError, match=r"in_axes=\{'mix': \(0,\)\}"):
        adapted(ForeignConv(), spec).apply({"params": params, "lora": adapters}, x)


def test_adapters_are_an_argument_not_a_constant():
    model, params, x, spec = CASES["decoder-default"]()
    adapters = init_adapters(jax.random.key(0), params, spec)
    apply = jax.jit(chex.assert_max_traces(lambda p, a: adapted(model, spec).apply({"params": p, "lora": a}, x), n=1))
    first, second = apply(params, adapters), apply(params, trained(adapters, spec))
    assert not np.array_equal(first, second)


def dropout_case(rate=0.5, rows=8):
    model, params, x, _ = CASES["decoder-default"]()
    spec = LoraSpec(dropout=rate)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    apply = jax.jit(lambda rngs: adapted(model, spec).apply({"params": params, "lora": adapters}, x, rngs=rngs))
    return apply, x, (model, params, adapters, spec)


def test_dropout_acts_only_when_a_key_is_passed():
    apply, _, (model, params, adapters, spec) = dropout_case()
    x = tokens(8)
    off = jit(adapted(model, LoraSpec()).apply)({"params": params, "lora": adapters}, x)
    assert largest_difference(apply(None), off) < 1e-6
    assert largest_difference(apply({"params": jax.random.key(0)}), off) < 1e-6
    on = apply({"dropout": jax.random.key(0)})
    assert largest_difference(on, off) > 1e-3
    assert np.array_equal(on, apply({"dropout": jax.random.key(0)}))
    assert not np.array_equal(on, apply({"dropout": jax.random.key(1)}))
    assert np.array_equal(on, apply({"dropout": jax.random.PRNGKey(0)})), "old-style keys are keys too"


def test_dropout_off_leaves_no_random_bits_in_the_program():
    apply, _, (model, params, adapters, _) = dropout_case()
    quiet = jax.jit(
        lambda k: adapted(model, LoraSpec()).apply({"params": params, "lora": adapters}, tokens(), rngs={"dropout": k})
    )
    random = ("threefry2x32", "rng_bit", "shift_right_logical")
    assert not any(word in quiet.lower(jax.random.key(0)).as_text() for word in random)
    assert any(word in apply.lower({"dropout": jax.random.key(0)}).as_text() for word in random)


@pytest.mark.parametrize("case", ["dense", "scan", "scan_remat"])
def test_dropout_is_inverted_dropout_of_the_input_even_in_a_foreign_scan(case):
    """The mean over many masks is the output without dropout, for a model that is linear in one adapted module."""
    model, params, x, spec = CASES[case]()
    spec = LoraSpec(**{**spec.to_dict(), "dropout": 0.4, "target_modules": ["out" if "scan" in case else "head"]})
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    apply = lambda rngs: adapted(model, spec).apply({"params": params, "lora": adapters}, x, rngs=rngs)
    many = jax.jit(jax.vmap(lambda k: apply({"dropout": k})))(jax.random.split(jax.random.key(0), 4000))
    assert largest_difference(many.mean(0), apply(None)) < 0.1
    assert float(many.std(0).min()) > 1e-3


def test_layers_of_a_foreign_scan_drop_differently():
    model, params, x, spec = CASES["scan"]()
    spec = LoraSpec(**{**spec.to_dict(), "dropout": 0.5, "target_modules": ["fc"]})
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    from stablelora_jax.lora.dropout import target_keys
    from stablelora_jax.lora.leaves import adapter_target_modules

    (target,) = adapter_target_modules(adapters, spec).values()
    assert len({tuple(row) for row in np.asarray(target_keys(jax.random.key(0), target)).tolist()}) == 4
    y = adapted(ForeignScan(), spec).apply({"params": params, "lora": adapters}, x, rngs={"dropout": jax.random.key(0)})
    assert np.isfinite(y).all()


def test_row_keys_make_masks_independent_of_the_batch():
    _, x, (model, params, adapters, spec) = dropout_case()
    keys = jax.random.split(jax.random.key(9), 8)
    apply = jax.jit(
        lambda x, k: adapted(model, spec).apply({"params": params, "lora": adapters}, x, rngs={"dropout": k})
    )
    whole = apply(x, keys)
    halves = jnp.concatenate([apply(x[:4], keys[:4]), apply(x[4:], keys[4:])])
    assert largest_difference(halves, whole) < 1e-5
    with pytest.raises(InputError, match="rows must be its first axis"):
        apply(x[:4], keys)


def test_scale_and_rate_are_traced():
    model, params, x, _ = CASES["decoder-default"]()
    spec = LoraSpec(dropout=0.3)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    apply = jax.jit(
        chex.assert_max_traces(
            lambda hp, k: adapted(model, spec).apply(
                {"params": params, "lora": adapters, "lora_hp": hp}, x, rngs={"dropout": k}
            ),
            n=1,
        )
    )
    key, numbers = jax.random.key(0), lora_hyperparams(spec, adapters)
    doubled = lora_hyperparams(LoraSpec(alpha=32, dropout=0.0), adapters)
    expected = jit(adapted(model, LoraSpec(alpha=32)).apply)({"params": params, "lora": adapters}, x)
    assert largest_difference(apply(doubled, key), expected) < 1e-5
    assert largest_difference(apply(numbers, key), expected) > 1e-3


def test_a_base_parameter_with_our_name_stays_the_bases():
    model, x, spec = FOREIGN["dense"][0], jnp.ones((2, 5, 6)), FOREIGN["dense"][2]
    params = random_params(model, x)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    expected = adapted(ForeignMLP(), spec).apply({"params": params, "lora": adapters}, x)
    params["split"]["lora_scale"] = jnp.zeros(())
    found = adapted(ForeignMLP(), spec).apply({"params": params, "lora": adapters}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class Doubling(nn.Dense):
    """A subclass that calls its parent: the interceptor sees two calls of one module."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Holder(nn.Module):
    """Gives a module a name."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make(name="inner")(x)


@pytest.mark.parametrize(
    "make", [partial(Doubling, 3), partial(nn.DenseGeneral, (2, 3), axis=(-1, -2))], ids=["subclass", "axes_backwards"]
)
def test_modules_that_need_care(make):
    x, model = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6)), jnp.float32), Holder(make)
    spec = LoraSpec(target_modules=["inner"], rank=2)
    params = random_params(model, x)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    merged = model.apply({"params": merge(params, adapters, spec)}, x)
    assert largest_difference(adapted(model, spec).apply({"params": params, "lora": adapters}, x), merged) < 1e-5


def test_a_module_at_the_root():
    x, model, spec = jnp.ones((2, 4)), nn.Dense(3), LoraSpec(target_modules="all-linear", rank=2)
    params = random_params(model, x)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    merged = model.apply({"params": merge(params, adapters, spec)}, x)
    assert largest_difference(adapted(model, spec).apply({"params": params, "lora": adapters}, x), merged) < 1e-5


def test_dora_scales_the_product_of_the_dropped_input():
    """PEFT's rule: with W = 1, B = 0 and twice the norm, y = x + (2 - 1) dropout(x) + bias."""

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="fc")(x)

    params = {"fc": {"kernel": jnp.eye(4), "bias": jnp.arange(4.0)}}
    spec = LoraSpec(target_modules=["fc"], rank=2, parametrization="dora", dropout=0.25)
    adapters = init_adapters(jax.random.key(0), params, spec)
    adapters["fc"]["lora_magnitude_vector"] *= 2
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
    lora, variables = adapted(One(), spec), {"params": params, "lora": adapters}
    np.testing.assert_allclose(lora.apply(variables, x), 2 * x + jnp.arange(4.0)[None], rtol=1e-5)
    part = lora.apply(variables, x, rngs={"dropout": jax.random.key(1)}) - jnp.arange(4.0)[None] - x
    dropped = np.abs(part) < 1e-5
    np.testing.assert_allclose(np.where(dropped, 0, part), np.where(dropped, 0, x / 0.75), atol=1e-5)
    assert 0.1 < dropped.mean() < 0.4


def test_a_missing_or_strange_leaf_is_named():
    model, params = tiny_decoder()
    plain, dora = LoraSpec(rank=2), LoraSpec(rank=2, parametrization="dora")
    adapters = {spec: init_adapters(jax.random.key(0), params, spec) for spec in (plain, dora)}
    apply = lambda spec, a: adapted(model, spec).apply({"params": params, "lora": a}, tokens())
    with pytest.raises(InputError, match="needs lora_magnitude_vector of shape .* it is missing"):
        apply(dora, adapters[plain])
    with pytest.raises(InputError, match="lora_magnitude_vector has no meaning for parametrization 'lora'"):
        apply(plain, adapters[dora])
    full = LoraSpec(rank=2, modules_to_save=["norm"])
    with pytest.raises(InputError, match="model.norm.lora_full.scale of the adapters must have the shape"):
        apply(full, adapters[plain])
    with pytest.raises(InputError, match="model.norm.lora_full.scale is trained in full, but the spec does not say so"):
        apply(plain, init_adapters(jax.random.key(0), params, full))
