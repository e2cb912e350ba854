"""A model on a quantised base: values, gradients, what the compiled step holds, loading, and all that reads a base."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, merge
from stablelora_jax.generation.generate import generate
from stablelora_jax.lora.summary import describe
from stablelora_jax.lora.transform import lora_hyperparams
from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.quantization import dequantize_tree, is_quantized, nf4, quantize_params
from stablelora_jax.utils.fingerprint import fingerprint
from tests.helpers import jit, largest_difference, tiny_decoder, tokens, trained

KINDS = ("int8", "nf4")
ALL = LoraSpec(rank=2, target_modules="all-linear")
DORA = LoraSpec(rank=2, target_modules=["q_proj", "down_proj"], parametrization="dora")


def base(kind, **sizes):
    model, params = tiny_decoder(**sizes)
    return model, jit(lambda tree: quantize_params(tree, kind))(params)


def loss_of(model, spec):
    def loss(adapters, params, x, numbers):
        variables = {"params": params, "lora": adapters, "lora_hp": numbers}
        return jnp.square(adapted(model, spec).apply(variables, x)).mean()

    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_layers_are_quantised_and_nothing_else(kind):
    _, params = base(kind)
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in found if is_quantized(leaf)}
    layers = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    assert names == {f"model.layers.{part}.{name}.kernel" for part, own in layers.items() for name in own}
    chex.assert_trees_all_equal(
        jax.eval_shape(lambda: dequantize_tree(params)), jax.eval_shape(lambda: tiny_decoder()[1])
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [ALL, DORA], ids=["lora", "dora"])
def test_values_and_gradients_are_those_on_the_dequantised_weights(kind, spec):
    model, params = base(kind)
    start = jit(lambda p: init_adapters(jax.random.key(0), p, spec))(params)
    if spec is DORA:  # whose magnitudes start from the values
        wanted = jit(lambda p: init_adapters(jax.random.key(0), p, spec))(dequantize_tree(params))
        chex.assert_trees_all_close(start, wanted, rtol=1e-6)
    adapters = trained(start, spec)
    step, x, numbers = jit(jax.value_and_grad(loss_of(model, spec))), tokens(), lora_hyperparams(spec, start)
    for size in (1.0, 0.5):  # the scale is traced
        scaled = jax.tree.map(lambda n, size=size: size * n, numbers)
        (a, found), (b, wanted) = step(adapters, params, x, scaled), step(adapters, dequantize_tree(params), x, scaled)
        assert abs(a - b) < 1e-5 * b
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
        assert largest > 1e-3
        for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_step_holds_one_layer(kind):
    L, D, F = 5, 52, 76  # kernels are the largest arrays: a token has few numbers, and there are few tokens
    sizes = dict(num_hidden_layers=L, hidden_size=D, intermediate_size=F, head_dim=26, num_attention_heads=2)
    model, params = base(kind, num_key_value_heads=1, **sizes)
    spec = LoraSpec(rank=3, target_modules="all-linear")
    adapters = init_adapters(jax.random.key(0), params, spec)
    step, numbers = jax.jit(jax.value_and_grad(loss_of(model, spec))), lora_hyperparams(spec, adapters)

    def floats(base):
        """The sizes of all floating-point arrays of the compiled step."""
        text = step.lower(adapters, base, tokens(1, 7), numbers).compile().as_text()
        shapes = re.findall(r"\b(?:f32|bf16|f16|f64)\[([\d,]+)\]", text)
        return {int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes}

    assert D * F in floats(params) and max(floats(params)) <= D * F + -D * F % nf4.BLOCK
    assert max(floats(dequantize_tree(params))) == L * D * F  # what would be seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_keeps_everything_is_refused(kind):
    model, params = base(kind)
    with pytest.raises(InputError, match="everything"):
        model.clone(remat="everything").apply({"params": params}, tokens())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_kernels_are_dense(kind):
    model, params = base(kind)
    spec = LoraSpec(rank=2, target_modules=["q_proj"])
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    merged = jit(lambda p, a: merge(p, a, spec))(params, adapters)
    assert not is_quantized(merged["model"]["layers"]["self_attn"]["q_proj"]["kernel"])
    assert is_quantized(merged["model"]["layers"]["self_attn"]["k_proj"]["kernel"])
    wanted = jit(lambda p, a: merge(p, a, spec))(dequantize_tree(params), adapters)
    chex.assert_trees_all_close(dequantize_tree(merged), wanted, atol=1e-6)
    expected = jit(lambda p, a: adapted(model, spec).apply({"params": p, "lora": a}, tokens()))(params, adapters)
    found = jit(lambda p: model.apply({"params": p}, tokens()))(merged)  # some kernels dense, some quantised
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [None, (0, 2)], ids=["all", "some"])
def test_quantised_kernels_can_be_trained_in_full(kind, layers):
    model, params = base(kind)
    names = ["o_proj"] if layers is None else [f"layers.{i}.self_attn.o_proj" for i in layers]
    spec = LoraSpec(rank=2, target_modules=["q_proj"], modules_to_save=names)
    adapters = init_adapters(jax.random.key(0), params, spec)
    own = adapters["model"]["layers"]["self_attn"]["o_proj"]["lora_full"]["kernel"]
    kernel = dequantize_tree(params["model"]["layers"]["self_attn"]["o_proj"]["kernel"])
    np.testing.assert_allclose(own, kernel if layers is None else kernel[np.array(layers)], rtol=1e-6)
    step, x, numbers = jit(jax.value_and_grad(loss_of(model, spec))), tokens(), lora_hyperparams(spec, adapters)
    (a, g), (b, h) = step(adapters, params, x, numbers), step(adapters, dequantize_tree(params), x, numbers)
    assert abs(a - b) < 1e-5 * b and largest_difference(g, h) < 1e-5


def test_fingerprints_name_the_arrays():
    _, params = base("nf4")
    found = fingerprint(params)
    other = jax.tree.map(lambda x: x, params)
    leaf = other["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    other["model"]["layers"]["mlp"]["up_proj"]["kernel"] = nf4.NF4(
        leaf.size, leaf.dtype, leaf.packed.at[1, 3].add(1), leaf.absmax, leaf.nested_absmax, leaf.nested_offset
    )
    changed = fingerprint(other)
    assert [name for name in found if found[name] != changed[name]] == ["model.layers.mlp.up_proj.kernel.packed"]


def test_describe_says_the_size():
    _, params = base("nf4", hidden_size=256, intermediate_size=512, head_dim=64)
    adapters = init_adapters(jax.random.key(0), params, ALL)
    *table, line = describe(params, adapters, ALL).splitlines()
    assert table == describe(dequantize_tree(params), adapters, ALL).splitlines()
    assert line.startswith("quantised base: 1,769,472 parameters in NF4, 4.127 bits each; ")


@pytest.mark.parametrize("make", [pmap_layout, mesh_layout], ids=["pmap", "mesh"])
def test_data_can_be_spread(make):
    model, params = base("nf4")
    layout, x = make(), tokens(8)
    placed = layout.place_base(params)
    assert {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed)} == {True}
    apply = layout.compile(
        lambda p, x: layout.sum_parts(jnp.square(model.apply({"params": p}, x)).sum()), ("base", "rows")
    )
    shapes = layout.abstract(jax.eval_shape(lambda: params), "base")
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    found = layout.fetch(apply(placed, layout.split(x)))
    np.testing.assert_allclose(found, jnp.square(model.apply({"params": params}, x)).sum(), rtol=1e-5)


@pytest.mark.parametrize("split", [dict(fsdp=2), dict(tensor=2)], ids=["fsdp", "tensor"])
def test_packed_bytes_are_not_split(split):
    _, params = base("nf4")
    with pytest.raises(InputError, match="_proj is quantised, which only data can spread"):
        mesh_layout(**split).place_base(params)


@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind):
    model, params = base(kind)
    found = generate(model, {"params": params}, [[1, 2, 3], [4, 5]], max_new_tokens=5)
    wanted = generate(model, {"params": dequantize_tree(params)}, [[1, 2, 3], [4, 5]], max_new_tokens=5)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
