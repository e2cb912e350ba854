"""Adapters on plain functions: loops, branches, several outputs, transforms of ``apply``, fields of the spec."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted
from tests.helpers import jit, long
from tests.lora.foreign import function_models as models
from tests.lora.foreign import laws
from tests.lora.foreign.function_rows import DECODER, LAYER, ROWS, R, conditional, decoder, haiku, pair, product, row
from tests.lora.foreign.laws import Row, perturbed, relative_difference
from tests.lora.foreign.product_models import IDS, X


def test_every_loop_is_the_same():
    """One stack of adapters gives the same numbers, whatever the loop over the layers."""
    rows = {name: decoder(name) for name in models.LOOPS}
    rows["by_while_loop"] = row(models.transformer(models.by_while_loop), DECODER)
    first = rows["by_scan"]
    adapters = perturbed(first.fresh())
    outputs = {name: jit(partial(r.run, r.lora()))(r.params, adapters, *r.args) for name, r in rows.items()}
    for name, y in outputs.items():
        assert relative_difference(y, outputs["by_scan"]) < 1e-5, name
        assert jax.tree.map(jnp.shape, rows[name].fresh()) == jax.tree.map(jnp.shape, adapters), name


def test_scan_in_reverse():
    laws.apply_is_merge(row(models.transformer(models.by_scan_reversed), DECODER, tolerance=1e-4), "lora")


@pytest.mark.parametrize("flag", [True, False])
def test_both_branches(flag):
    """Only the branch that is taken changes the output; the adapters of both are found."""
    found = conditional()
    x = found.args[0]
    adapters = perturbed(found.fresh())
    y, merged = (
        found.run(found.lora(), found.params, adapters, x, flag),
        found.lora().merge(found.params, adapters, x, flag),
    )
    assert relative_difference(y, found.base(merged, x, flag)) < 1e-5
    unused = "no" if flag else "yes"
    changed = {**adapters, unused: jax.tree.map(jnp.zeros_like, adapters[unused])}
    assert relative_difference(found.run(found.lora(), found.params, changed, x, flag), y) == 0


def test_several_outputs():
    """The structure of the output is the model's; keyword arguments reach it."""
    fn, params, args = models.several_outputs()
    lora = adapted(fn, LoraSpec(target_modules="all-linear", rank=R))
    adapters = perturbed(lora.init(jax.random.key(0), params, *args, scale=2.0))
    y = jax.jit(lambda a: lora.apply({"params": params, "lora": a}, *args, scale=2.0))(adapters)
    want = fn(lora.merge(params, adapters), *args, scale=2.0)
    assert jax.tree.structure(y) == jax.tree.structure(want)
    assert relative_difference(y, want) < 1e-5
    assert y["none"] is None


def test_shapes_are_enough():
    """``init`` takes ``ShapeDtypeStruct`` for the base and for the arguments."""
    found = decoder("by_scan")
    fresh = found.lora().init(jax.random.key(3), *shapes_of(found.params, *found.args))
    assert relative_difference(fresh, found.fresh()) == 0


def test_transforms_of_apply():
    """``vmap`` over adapters, ``jvp`` and ``jacfwd`` go through as through any function."""
    found = product("matmul")
    lora, adapters = found.lora(), perturbed(found.fresh())
    run = lambda a: found.run(lora, found.params, a, *found.args)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapters)
    both = jax.vmap(run)(two)
    assert relative_difference(both[1], run(jax.tree.map(lambda x: 2 * x, adapters))) < 1e-5
    out, tangent = jax.jvp(run, (adapters,), (adapters,))
    base = found.base(found.params, *found.args)
    assert relative_difference(tangent, 2 * (out - base)) < 1e-5


def test_a_jitted_function_is_traced_once():
    """Twenty calls of the adapted model under one jit trace the user's function as often as one call."""
    fn, params, args = models.haiku_like()
    count = []

    def counted(params, tokens):
        count.append(1)
        return fn(params, tokens)

    lora = adapted(counted, LoraSpec(target_modules="all-linear", rank=R))
    adapters = lora.init(jax.random.key(0), params, *args)
    step = jax.jit(lambda a, *args: lora.apply({"params": params, "lora": a}, *args))
    step(adapters, *args)
    traces = len(count)
    for _ in range(20):
        step(adapters, *args)
    assert len(count) == traces


def test_merge_in_another_process():
    """Without ``init`` or ``apply`` before, merging finds the axes by example arguments, and says so without them."""
    found = haiku()
    adapters = perturbed(found.fresh())
    merged = found.lora().merge(found.params, adapters, *found.args)
    assert relative_difference(merged, found.lora().merge(found.params, adapters, *shapes_of(*found.args))) == 0
    want = found.run(found.lora(), found.params, adapters, *found.args)
    assert relative_difference(found.base(merged, *found.args), want) < 1e-5
    with pytest.raises(InputError, match="example arguments"):
        found.lora().merge(found.params, adapters)


def test_one_object_for_two_calls():
    """What one call has found does not stand in the way of another with other arguments, or other parameters."""

    def fn(params, x, transposed=False):
        return x @ (params["w"]["kernel"].T if transposed else params["w"]["kernel"])

    params, x, wide = {"w": {"kernel": models.normal(1, 8, 12)}}, models.normal(2, 4, 8), models.normal(3, 4, 12)
    lora = adapted(fn, LoraSpec(target_modules=["w"], rank=R))
    one = perturbed(lora.init(jax.random.key(0), params, x))
    two = perturbed(lora.init(jax.random.key(0), params, wide, transposed=True))
    assert one["w"]["lora_a"].shape == (8, R) and two["w"]["lora_a"].shape == (12, R)
    for _ in range(2):
        y = lora.apply({"params": params, "lora": one}, x)
        assert relative_difference(y, x @ (params["w"]["kernel"] + 8 * one["w"]["lora_a"] @ one["w"]["lora_b"])) < 1e-5
        y = lora.apply({"params": params, "lora": two}, wide, transposed=True)
        change = 8 * two["w"]["lora_a"] @ two["w"]["lora_b"]
        assert relative_difference(y, wide @ (params["w"]["kernel"].T + change)) < 1e-5


def shapes_of(*args):
    return jax.eval_shape(lambda *x: x, *args)


@pytest.mark.parametrize("name", [name if name == "by_fori_loop" else long(name) for name in models.LOOPS])
def test_one_layer(name):
    """A stack of one layer is a stack."""
    fn, params, args = models.transformer(models.LOOPS[name], 1)
    shapes = {f"layers.{leaf}": pair(*size, 1) for leaf, size in LAYER.items()}
    found = row((fn, params, args), shapes, tolerance=1e-4)
    laws.adapters_are_as_expected(found)
    laws.apply_is_merge(found, "lora")


def test_a_module_is_saved():
    """``modules_to_save`` names a module of Haiku's, whose leaves are then trained in full."""
    found = row(models.haiku_like(), {}, ["net/~/mlp/~/linear_0"], modules_to_save=("net/~/mlp/~/linear_1",))
    adapters = perturbed(found.fresh())
    assert adapters["net/~/mlp/~/linear_1"]["lora_full"].keys() == {"w", "b"}
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * models.normal(leaf.size, *leaf.shape), adapters)
    lora = found.lora()
    y = found.run(lora, found.params, adapters, *found.args)
    assert relative_difference(y, found.base(lora.merge(found.params, adapters), *found.args)) < 1e-5


def half(tree):
    """``tree`` in bfloat16."""
    cast = lambda leaf: leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    return jax.tree.map(cast, tree)


@pytest.mark.parametrize("name", [long("by_scan"), "haiku_table", "second_axis"])
def test_bfloat16(name):
    """A base in bfloat16: outputs and merged parameters have its dtypes, adapters are float32, and B = 0 is exact."""
    found = ROWS[name]()
    found = dataclasses.replace(found, params=half(found.params), args=half(found.args))
    laws.fresh_adapters_change_nothing(found)
    lora, adapters = found.lora(), perturbed(found.fresh())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))
    y, merged = jit(partial(found.run, lora, found.params))(adapters, *found.args), lora.merge(found.params, adapters)
    kinds = partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert kinds(merged) == kinds(found.params)
    assert kinds(y) == kinds(jax.eval_shape(found.base, found.params, *found.args))
    assert relative_difference(y.astype(jnp.float32), jit(found.base)(merged, *found.args).astype(jnp.float32)) < 0.05


def sizes(jaxpr):
    """How many numbers each array has that a jaxpr computes, at every depth."""
    for eqn in jaxpr.eqns:
        yield from (getattr(variable.aval, "size", 0) for variable in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            yield from sizes(inner) if hasattr(inner, "eqns") else ()


FORMS = {
    "matmul": (lambda p, x: x @ p["w"], (64, 48)),
    "transposed": (lambda p, x: x @ p["w"].T, (48, 64)),
    "scan": (lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], (3, 64, 64)),
    "table": (lambda p, x: p["w"][jnp.argmax(x, -1)], (100, 48)),
}


@pytest.mark.parametrize("name", FORMS)
def test_no_array_of_the_size_of_a_kernel(name):
    """Neither values nor gradients form ``A B``, nor anything else of the kernel's size."""
    fn, shape = FORMS[name]
    params, x = {"w": models.normal(1, *shape)}, models.normal(2, 4, 64)
    lora = adapted(fn, LoraSpec(target_modules=["w"], rank=R))
    adapters = lora.init(jax.random.key(0), params, x)
    loss = lambda a: lora.apply({"params": params, "lora": a}, x).sum()
    closed = jax.make_jaxpr(jax.value_and_grad(loss))(adapters)
    kernel = shape[-1] * shape[-2]
    views = kernel if name == "transposed" else 0  # the base's own transpose
    assert max(size for size in sizes(closed.jaxpr) if size != views) < kernel


def test_experts_by_index():
    """Matrices that are looked up by each token's expert: a pair for each expert."""
    fn = lambda p, x: jnp.einsum("btd,btdf->btf", x, p["w"]["kernel"][IDS])
    found = row((fn, {"w": {"kernel": models.normal(4, 4, 8, 12)}}, (X,)), {"w": pair(8, 12, 4)}, ["w"])
    laws.adapters_are_as_expected(found)
    laws.apply_is_merge(found, "lora")


def test_containers():
    """Lists, tuples and integer keys are numbers in names; merging gives the same containers."""
    params = [{0: {"w": models.normal(1, 8, 8)}}, (models.normal(2, 8, 8), models.normal(3, 8)), {"s": 2.0, "n": None}]
    fn = lambda p, x: p[2]["s"] * (jnp.tanh(x @ p[0][0]["w"]) @ p[1][0] + p[1][1][None, None])
    found = row((fn, params, (X,)), {"0.0": pair(8, 8), "1.0": pair(8, 8)})
    laws.adapters_are_as_expected(found)
    laws.apply_is_merge(found, "lora")


CHANGES = {
    "rank_of_a_layer": {"rank": 3, "rank_pattern": {"layers.1.up": 1}},
    "rank_and_alpha": {"rank_pattern": {"up": 1}, "alpha_pattern": {"down": 5}},
    "some_layers": {"layers_to_transform": (0, 2)},
    "one_layer": {"target_modules": ["layers.1.up"]},
}


@pytest.mark.parametrize("name", [name if "layer" in name else long(name) for name in CHANGES])
def test_fields_of_the_spec(name):
    """Patterns, layers and parameters trained in full, on a stack that a scan goes over."""
    spec = {"target_modules": ["up", "down"], **CHANGES[name]}
    found = row(models.transformer(models.by_scan), {}, spec.pop("target_modules"), tolerance=1e-4)
    changed = Row(**{**vars(found), "spec": dataclasses.replace(found.spec, **spec)})
    laws.apply_is_merge(changed, "lora")
    laws.fresh_adapters_change_nothing(changed)


def test_dropout_of_the_model_and_of_the_adapter():
    """Without keys nothing is dropped; with them the low-rank path is, and the base is as it was."""
    found = product("matmul")
    lora = found.lora(dropout=0.5)
    adapters = perturbed(lora.init(jax.random.key(0), found.params, *found.args))
    variables = {"params": found.params, "lora": adapters}
    run = lambda rngs: np.asarray(lora.apply(variables, *found.args, rngs=rngs))
    keys = [{"dropout": jax.random.key(i)} for i in (1, 1, 2)]
    one, same, other = map(run, keys)
    assert (one == same).all() and (one != other).any() and (one != run(None)).any()
    nothing = jax.tree.map(jnp.zeros_like, adapters)
    dropped = lora.apply({"params": found.params, "lora": nothing}, *found.args, rngs=keys[0])
    assert relative_difference(dropped, found.base(found.params, *found.args)) < 1e-6
