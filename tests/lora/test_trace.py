"""Reading a model by its computation: against the path at Flax's own modules, and what the compiled step holds."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import (
    InputError,
    LoraSpec,
    adapted,
    describe,
    init_adapters,
    lora_hyperparams,
    stable_lora,
    still_shrinking,
)
from stablelora_jax.lora.trace.apply import find_targets
from stablelora_jax.quantization import quantize
from tests.helpers import jit, tiny_decoder

LENGTH, WIDTH, INNER = 4, 32, 48


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 4


def layers(params, x):
    """Scanned feed-forward layers with remat: a plain function of a tree."""

    def body(x, layer):
        hidden = jax.nn.gelu(x @ layer["up"])
        return x + hidden @ layer["down"], None

    return jax.lax.scan(jax.checkpoint(body), x, params["blocks"])[0]


def stack(dtype=jnp.float32):
    up, down = draw(0, LENGTH, WIDTH, INNER), draw(1, LENGTH, INNER, WIDTH)
    return {"blocks": {"up": up.astype(dtype), "down": down.astype(dtype)}}


def changed(adapters):
    leaves, structure = jax.tree.flatten(adapters)
    rng = np.random.default_rng(7)  # NumPy compiles nothing
    noise = [np.asarray(rng.normal(size=leaf.shape) / 40, leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(np.asarray(a) + b) for a, b in zip(leaves, noise, strict=True)])


def both(spec):
    """The tiny decoder by its modules and by its computation."""
    model, params = tiny_decoder()
    tokens = jnp.arange(12).reshape(2, 6) % 30
    one, two = adapted(model, spec), adapted(model, spec)
    two.found.update(find_targets(two, {"params": params}, (tokens,), {}))
    return one, two, params, changed(init_adapters(jax.random.key(0), params, spec)), tokens


@pytest.mark.parametrize("parametrization", ["lora", "dora"])
def test_both_paths_agree_in_values_gradients_and_flops(parametrization):
    one, two, params, adapters, tokens = both(
        LoraSpec(target_modules="all-linear", rank=3, parametrization=parametrization)
    )

    def loss(lora):
        step = jax.jit(jax.value_and_grad(lambda a, p: jnp.square(lora.apply({"params": p, "lora": a}, tokens)).mean()))
        return step.lower(adapters, params).compile()

    expected, found = loss(one), loss(two)
    for left, right in zip(
        jax.tree.leaves(expected(adapters, params)), jax.tree.leaves(found(adapters, params)), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=1e-6)
    if parametrization == "lora":
        assert found.cost_analysis()["flops"] <= 1.01 * expected.cost_analysis()["flops"]


def test_dropout_masks_are_those_of_the_path_at_modules():
    one, two, params, adapters, tokens = both(LoraSpec(target_modules="all-linear", rank=3, dropout=0.5))
    variables = {"params": params, "lora": adapters, "lora_hp": lora_hyperparams(one.spec, adapters)}
    key = {"dropout": jax.random.key(3)}
    expected, found = (jit(lora.apply)(variables, tokens, rngs=key) for lora in (one, two))
    np.testing.assert_allclose(expected, found, rtol=1e-4, atol=1e-5)
    assert not np.allclose(jit(two.apply)(variables, tokens), found)


def shapes_in(compiled):
    """Every array shape in the compiled program, with how often it is an instruction's result."""
    found = {}
    for shape in re.findall(r"= (?:f32|bf16|s8|u8)\[([\d,]*)\]", compiled.as_text()):
        found[shape] = found.get(shape, 0) + 1
    return found


def compiled_step(spec, params):
    x, lora = draw(2, 5, WIDTH), adapted(layers, spec)
    adapters = lora.init(jax.random.key(0), params, x)

    def step(adapters, params, x):
        return jax.grad(lambda a: jnp.square(lora.apply({"params": params, "lora": a}, x)).mean())(adapters)

    return jax.jit(step).lower(adapters, params, x).compile()


def test_the_step_holds_no_kernel_beyond_the_base():
    """Neither ``W0 + s A B`` nor a gradient of W0 is formed, of one layer or of the stack."""
    params = stack()
    plain = jax.jit(jax.grad(lambda x, p: jnp.square(layers(p, x)).mean())).lower(draw(2, 5, WIDTH), params).compile()
    base, step = shapes_in(plain), shapes_in(compiled_step(LoraSpec(rank=2, target_modules=["up", "down"]), params))
    for shape in (f"{LENGTH},{WIDTH},{INNER}", f"{LENGTH},{INNER},{WIDTH}", f"{WIDTH},{INNER}", f"{INNER},{WIDTH}"):
        assert step.get(shape, 0) <= base.get(shape, 0) + 2  # slices and layouts of the base itself
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    compiled = compiled_step(LoraSpec(rank=2, target_modules=["up", "down"]), params)
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2


def test_scanned_layers_stay_one_copy_whatever_their_number():
    """MaxText issue 5129: an adapter of a scanned model took 1,194 MB where its weights are 6.1 MB."""
    spec = LoraSpec(rank=2, target_modules=["up", "down"])

    def memory(length):
        params = jax.tree.map(lambda leaf: jnp.repeat(leaf, length // LENGTH, axis=0), stack())
        adapters = adapted(layers, spec).init(jax.random.key(0), params, draw(2, 5, WIDTH))
        analysis = compiled_step(spec, params).memory_analysis()
        return analysis.output_size_in_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))

    for length in (LENGTH, 4 * LENGTH):
        outputs, size = memory(length)
        assert outputs <= size + 1024  # the gradients of the pairs and nothing else


def test_a_quantised_stack_is_dequantised_layer_by_layer():
    params = stack()
    packed = {"blocks": {name: quantize(leaf, "int8") for name, leaf in params["blocks"].items()}}
    x, spec = draw(2, 5, WIDTH), LoraSpec(rank=2, target_modules=["up", "down"])
    lora = adapted(layers, spec)
    adapters = changed(lora.init(jax.random.key(0), packed, x))
    found = lora.apply({"params": packed, "lora": adapters}, x)
    np.testing.assert_allclose(found, layers(lora.merge(packed, adapters), x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, layers(lora.merge(params, adapters), x), rtol=0.1, atol=0.1)
    text = compiled_step(spec, packed).as_text()
    assert not re.search(rf"= f32\[{LENGTH},{WIDTH},{INNER}\]", text)


@jax.custom_jvp
def own_product(x, w):
    return x @ w


own_product.defjvps(lambda dx, y, x, w: dx @ w, lambda dw, y, x, w: x @ dw)


def test_a_leaf_that_nobody_can_follow_is_refused_or_merged():
    def model(params, x):
        return own_product(x @ params["first"], params["second"])

    params, x, spec = {"first": draw(0, 4, 6), "second": draw(1, 6, 3)}, draw(2, 5, 4), LoraSpec(rank=2)
    spec = LoraSpec(rank=2, target_modules=["first", "second"])
    with pytest.raises(InputError, match=r"second is read by a function .* exclude_modules.*merged=\('second',\)"):
        adapted(model, spec).init(jax.random.key(0), params, x)
    lora = adapted(model, spec, merged=("second",))
    adapters = changed(lora.init(jax.random.key(0), params, x))
    found = lora.apply({"params": params, "lora": adapters}, x)
    np.testing.assert_allclose(found, model(lora.merge(params, adapters), x), rtol=1e-5, atol=1e-6)


class Table(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = self.param("table", nn.initializers.normal(), (11, 8))
        kernel = self.param("own", nn.initializers.normal(), (2, 8, 3))
        scale = self.param("scale", nn.initializers.ones, (2, 2))
        return jnp.einsum("td,ndh->tnh", table[tokens], kernel) + scale.sum()


def test_describe_shows_every_leaf_and_how_it_is_read():
    model, tokens = Table(), jnp.arange(5)
    params = model.init(jax.random.key(0), tokens)["params"]
    lines = adapted(model, LoraSpec()).describe(params, tokens).splitlines()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert rows["table"] == "(11, 8) - 11 8 looked up"
    assert rows["own"] == "(2, 8, 3) - 8 2x3 multiplied"
    assert rows["scale"].endswith("is read by reduce_sum")


def experts(params, x):
    def layer(x, own):
        hidden = jax.nn.relu(jnp.einsum("ecd,edf->ecf", x, own["wi"]))
        return x + jnp.einsum("ecf,efd->ecd", hidden, own["wo"]), None

    return jax.lax.scan(layer, x, params["layers"])[0]


def test_experts_have_a_pair_a_latch_and_a_count_each():
    params, x = {"layers": {"wi": draw(0, 2, 3, 8, 6), "wo": draw(1, 2, 3, 6, 8)}}, draw(2, 3, 4, 8)
    lora = adapted(experts, LoraSpec(rank=2, target_modules=["wi", "wo"]))
    adapters = lora.init(jax.random.key(0), params, x)
    assert adapters["layers"]["wi"]["lora_a"].shape == (2, 3, 8, 2)
    latches = still_shrinking(stable_lora(1e-3).init(adapters))
    assert len(latches) == 12 and "layers.1.wi[2]" in latches
    table = describe(params, adapters, lora.spec).splitlines()
    assert table[1].split() == ["layers.wi", "6", "of", "6", "8", "6", "2", "8", "168"]
    assert table[-1].startswith("trainable params: 336 || all params: 912")


def test_a_leaf_that_is_its_own_stack_is_found_by_its_name():
    params = {"wi": {"kernel": jnp.ones((4, 16, 32))}}
    adapters = init_adapters(jax.random.key(0), params, LoraSpec(rank=2, target_modules=["wi"], stacked=("wi",)))
    assert adapters["wi"]["lora_a"].shape == (4, 16, 2)


def test_merging_asks_for_arguments_where_a_square_leaf_does_not_tell():
    def model(params, x):
        return x @ params["a"]["kernel"].T

    params, x, spec = {"a": {"kernel": draw(0, 8, 8)}}, draw(1, 3, 8), LoraSpec(rank=2, target_modules=["a"])
    adapters = changed(adapted(model, spec).init(jax.random.key(0), params, x))
    with pytest.raises(InputError, match="a: .* does not tell which axes .* example arguments"):
        adapted(model, spec).merge(params, adapters)
    merged = adapted(model, spec).merge(params, adapters, x)
    found = adapted(model, spec).apply({"params": params, "lora": adapters}, x)
    np.testing.assert_allclose(found, model(merged, x), rtol=1e-5, atol=1e-5)
    known = adapted(model, spec)
    known.init(jax.random.key(0), params, x)
    for wrong in ({"a": {"kernel": draw(0, 8, 9)}}, {"b": {"kernel": draw(0, 8, 8)}}):
        with pytest.raises(InputError, match="a: the pair is for a leaf of .* another model"):
            known.merge(wrong, adapters)


def test_outputs_that_are_no_arrays_are_handed_on():
    def model(params, x, mode):
        return {"y": x @ params["w"], "mode": mode, "none": None, "number": 3}

    params, x = {"w": draw(0, 8, 4)}, draw(1, 3, 8)
    lora = adapted(model, LoraSpec(rank=2, target_modules=["w"]))
    adapters = lora.init(jax.random.key(0), params, x, "train")
    found = lora.apply({"params": params, "lora": adapters}, x, "train")
    assert found["mode"] == "train" and found["none"] is None and found["number"] == 3
    np.testing.assert_array_equal(found["y"], model(params, x, "train")["y"])
    with pytest.raises(InputError, match="rngs hold 'params', which only Linen models have"):
        lora.apply({"params": params, "lora": adapters}, x, "train", rngs={"params": jax.random.key(0)})
