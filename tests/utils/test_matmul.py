"""The two products of the low-rank path: values, gradients, dtypes, and what the backward pass keeps."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from stablelora_jax import LoraSpec, adapted, freeze_a, init_adapters
from stablelora_jax.training.flops import dots
from stablelora_jax.utils.matmul import matmul
from tests.helpers import random_params, trained

SHAPES = [((4,), 6), ((6,), 4), ((3, 4), 6), ((2, 3, 6), 4), ((1, 1, 5), 5)]


def drawn(shape, m, dtype=np.float64, seed=0):
    """``(x, factor, cotangent)``."""
    rng = np.random.default_rng(seed)
    sizes = (shape, (shape[-1], m), (*shape[:-1], m))
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in sizes)


def by_hand(x, factor, cotangent):
    """``(x A, dx, dA)`` in float64."""
    x, factor, cotangent = (np.float64(a) for a in (x, factor, cotangent))
    rows = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    return x @ factor, cotangent @ factor.T, rows[0].T @ rows[1]


def products(x, factor, cotangent):
    y, pull = jax.vjp(matmul, x, factor)
    return y, *pull(cotangent.astype(y.dtype))


@pytest.mark.parametrize("shape,m", SHAPES)
def test_it_is_a_matrix_product_in_float64(shape, m, x64):
    given = drawn(shape, m)
    found = products(*given)
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float64")}
    for a, b in zip(found, by_hand(*given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape,m", SHAPES[1:4])
def test_it_is_a_matrix_product_in_float32(shape, m):
    given = drawn(shape, m, np.float32)
    for a, b in zip(products(*given), by_hand(*given), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape,m", SHAPES[2:4])
def test_bfloat16_activations_and_float32_factors(shape, m):
    """The product and both gradients are those of the rounded operands; the factor's own is float32."""
    x, factor, cotangent = drawn(shape, m, np.float32)
    x = x.astype(jnp.bfloat16)
    y, dx, gradient = jax.jit(products)(x, factor, cotangent)  # compiled: XLA's CPU lacks some products of bfloat16
    assert (y.dtype, dx.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = by_hand(x, factor.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16))
    np.testing.assert_allclose(y, rounded[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.float64(dx), rounded[1], rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(gradient, rounded[2], rtol=1e-5, atol=1e-6)
    exact = by_hand(x, factor, cotangent)
    np.testing.assert_allclose(gradient, exact[2], atol=2**-7 * np.abs(exact[2]).max())
    master = factor.astype(jnp.bfloat16).astype(jnp.float32) != factor
    assert master.any(), "a factor that bfloat16 holds would show nothing"


def equations(jaxpr):
    """Every equation, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            yield from equations(inner) if hasattr(inner, "eqns") else ()


def operands(function, *arguments):
    """Shapes and dtypes of the operands of every ``dot_general``."""
    found = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    dotted = [e for e in found if e.primitive.name == "dot_general"]
    return [tuple((x.aval.shape, x.aval.dtype.name) for x in e.invars) for e in dotted]


class Two(nn.Module):
    """Two layers: what the second one reads has a gradient."""

    @nn.compact
    def __call__(self, x):
        dense = lambda name: nn.Dense(12, use_bias=False, dtype=x.dtype, param_dtype=x.dtype, name=name)
        return dense("up")(nn.tanh(dense("down")(x)))


SPEC = LoraSpec(target_modules=["up", "down"], rank=2)


def two(dtype=jnp.float32):
    """``(loss of adapters, adapters)``; the second layer reads (5, 7, 12)."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 7, 9)), dtype)
    params = random_params(Two(), x)
    adapters = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    apply = lambda adapters: adapted(Two(), SPEC).apply({"params": params, "lora": adapters}, x)
    return lambda adapters: jnp.square(apply(adapters)).sum(), adapters


def test_the_wide_operand_of_a_gradient_is_read_as_it_lies():
    """A sum over rows reads its first operand transposed: that is the thin one, for A and for B."""
    loss, adapters = two()
    dotted = [e for e in equations(jax.make_jaxpr(jax.grad(loss))(adapters).jaxpr) if e.primitive.name == "dot_general"]
    over_rows = [e for e in dotted if e.params["dimension_numbers"][0] == ((0,), (0,))]
    assert len(over_rows) == 4
    assert all(e.invars[0].aval.shape[-1] == 2 < e.invars[1].aval.shape[-1] for e in over_rows)


def test_no_product_mixes_dtypes():
    loss, adapters = two(jnp.bfloat16)
    found = operands(jax.grad(loss), adapters)
    assert len(found) == 6 + 5 + 3, "forwards; then the second layer's, and the first's, whose input is constant"
    assert {dtype for pair in found for _, dtype in pair} == {"bfloat16"}, found
    turned = [e for e in equations(jax.make_jaxpr(jax.grad(loss))(adapters).jaxpr) if e.primitive.name == "transpose"]
    assert all(e.invars[0].aval.ndim == 2 for e in turned), "no activation is copied to be transposed"


def kept(loss, adapters):
    """Shapes of what the backward pass keeps."""
    return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(loss, a)[1], adapters))]


class Sum(nn.Module):
    """A layer whose result has a derivative that needs nothing."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(13, use_bias=False, name="up")(x).sum()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_constant_a_keeps_only_the_thin_product(frozen):
    """LoRA-FA saves x A and not x, though x itself has a gradient."""
    spec, x = LoraSpec(target_modules=["up"], rank=2), jnp.ones((5, 7, 12))
    params = random_params(Sum(), x)
    adapters = init_adapters(jax.random.key(0), params, spec)

    def loss(given):
        adapters, x = given
        pairs = freeze_a(adapters) if frozen else adapters
        return adapted(Sum(), spec).apply({"params": params, "lora": pairs}, x)

    shapes = kept(loss, (adapters, x))
    assert ((5, 7, 12) in shapes) is not frozen and (5, 7, 2) in shapes
    assert {shape for shape in shapes if len(shape) == 3} <= {(5, 7, 12), (5, 7, 2)}
    gradient = jax.grad(loss)((adapters, x))[0]["up"]
    assert (np.asarray(gradient["lora_a"]) == 0).all() and (np.asarray(gradient["lora_b"]) != 0).any()


def test_what_is_constant_costs_no_product():
    x, factor, _ = drawn((3, 4), 6, np.float32)
    one = 2 * 3 * 4 * 6
    count = lambda f, *given: dots(jax.make_jaxpr(f)(*given))
    assert count(matmul, x, factor) == one
    assert count(jax.grad(lambda x, a: matmul(x, a).sum(), (0, 1)), x, factor) == 3 * one
    for argument in (0, 1):
        assert count(jax.grad(lambda x, a: matmul(x, a).sum(), argument), x, factor) == 2 * one
    assert kept(lambda a: matmul(x, a).sum(), factor).count((4, 6)) == 0
    assert kept(lambda x: matmul(x, factor).sum(), x).count((3, 4)) == 0


def test_a_result_that_nothing_reads_has_no_gradient():
    x, factor, _ = drawn((3, 4), 6, np.float32)
    loss = lambda x, a: (matmul(x, a) * 0, x.sum())[1]
    dx, gradient = jax.grad(loss, (0, 1))(x, factor)
    assert (np.asarray(dx) == 1).all() and (np.asarray(gradient) == 0).all()


def test_under_vmap_scan_and_checkpoint():
    """A stack of layers, as a scan slices it, and experts, as ``vmap`` does."""
    x, factors = jnp.ones((2, 3, 4)), drawn((3, 4), 4, np.float32)[0][:, :, None] * jnp.eye(4)[None]
    body = jax.checkpoint(lambda c, a: (jnp.sin(matmul(c, a)), None))
    plain = lambda c, a: (jnp.sin(c @ a), None)
    loss = lambda body: lambda x, a: jnp.square(jax.lax.scan(body, x, a)[0]).sum()
    for found, expected in zip(*(jax.grad(loss(f), (0, 1))(x, factors) for f in (body, plain)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    many = lambda f: lambda x, a: jnp.square(jax.vmap(f, (None, 0))(x, a)).sum()
    for found, expected in zip(*(jax.grad(many(f), (0, 1))(x, factors) for f in (matmul, jnp.matmul)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def of_pair(a, b, x):
    """A loss through both products."""
    return jnp.sum(jnp.sin(matmul(matmul(x, a), b)))


@pytest.mark.parametrize("check", [True, False])
def test_gradients_inside_shard_map(check):
    """Where ``shard_map`` checks what varies, the gradient of what does not is the sum; else it is the device's own."""
    x, a, _ = drawn((8, 3, 6), 2, np.float32)
    b = drawn((2,), 6, np.float32)[1]
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))

    def gradients(a, b, x):
        da, db, dx = jax.grad(of_pair, (0, 1, 2))(a, b, x)
        return (da, db, dx) if check else (*jax.lax.psum((da, db), "rows"), dx)

    lie = (PartitionSpec(), PartitionSpec(), PartitionSpec("rows"))
    found = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=lie, out_specs=lie, check_vma=check))(a, b, x)
    for one, other in zip(found, jax.grad(of_pair, (0, 1, 2))(a, b, x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


EXPLICIT = {  # where x, A and B lie, on a mesh of 4 x 2
    "rows": (("d",), (), ()),
    "rows and tokens": (("d", "t"), (), ()),
    "the outputs of B": (("d",), (), (None, "t")),
    "the inputs of A": (("d",), ("t",), ()),
    "what knows no mesh": (("d",), None, None),
}


@pytest.mark.parametrize("name", EXPLICIT)
def test_gradients_on_a_mesh_with_explicit_axes(name):
    """They lie as the factors do."""
    x, a, _ = drawn((8, 4, 6), 2, np.float32)
    b = drawn((2,), 6, np.float32)[1]
    wanted = jax.grad(of_pair, (0, 1, 2))(a, b, x)
    with jax.set_mesh(jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)):
        specs = [None if axes is None else PartitionSpec(*axes) for axes in EXPLICIT[name]]
        x, a, b = (v if s is None else jax.device_put(v, s) for v, s in zip((x, a, b), specs, strict=True))
        found = jax.jit(jax.grad(of_pair, (0, 1, 2)))(a, b, x)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for gradient, spec in zip(found, (specs[1], specs[2], specs[0]), strict=True):
        assert gradient.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(gradient.sharding.mesh, spec or PartitionSpec()), gradient.ndim
        )


# -- forward mode
def tangents(x, factor, dx, dfactor):
    return jax.jvp(matmul, (x, factor), (dx, dfactor))[1]


@pytest.mark.parametrize("shape,m", SHAPES[1:4])
def test_tangents_are_those_of_a_matrix_product(shape, m, x64):
    (x, factor, _), (dx, dfactor, _) = drawn(shape, m), drawn(shape, m, seed=1)
    np.testing.assert_allclose(tangents(x, factor, dx, dfactor), dx @ factor + x @ dfactor, rtol=1e-12, atol=1e-12)
    check_grads(matmul, (x, factor), order=2, modes=("fwd", "rev"))  # finite differences


def test_a_tangent_of_bfloat16_activations_is_float32():
    (x, factor, _), (_, dfactor, _) = drawn((3, 4), 6, np.float32), drawn((3, 4), 6, np.float32, seed=1)
    x, zero = x.astype(jnp.bfloat16), jnp.zeros((3, 4), jnp.bfloat16)
    found = jax.jit(tangents)(x, factor, zero, dfactor)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, by_hand(x, dfactor.astype(jnp.bfloat16), found)[0], rtol=1e-5, atol=1e-6)


def test_a_constant_has_no_tangent_product():
    x, factor, _ = drawn((3, 4), 6, np.float32)
    count = lambda f, *given: str(jax.make_jaxpr(lambda *v: jax.jvp(f, v, v))(*given)).count("thin_matmul[")
    assert count(matmul, x, factor) == 2
    assert count(lambda x: matmul(x, factor), x) == count(lambda a: matmul(x, a), factor) == 1


def seconds(f, *given):
    """A product of the Hessian and a vector, by three orders of differentiation."""
    vector = jax.tree.map(jnp.cos, given)
    along = lambda *given: jax.jvp(f, given, vector)[1]
    slope = lambda *given: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grad(*given), vector)))
    every = tuple(range(len(given)))
    grad = jax.grad(f, every)
    return jax.jvp(grad, given, vector)[1], jax.grad(along, every)(*given), jax.grad(slope, every)(*given)


def close(trees, others, **tolerance):
    for one, other in zip(jax.tree.leaves(trees), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


def test_products_with_the_hessian_under_vmap_scan_and_checkpoint(x64):
    x, factors = drawn((2, 3, 4), 4)[0], drawn((3, 4), 4)[0][:, :, None] * jnp.eye(4)[None]

    def loss(product):
        def layers(x, factors):
            body = jax.checkpoint(lambda c, a: (jnp.sin(product(c, a)), None))
            return jax.lax.scan(body, x, factors)[0]

        def experts(x, factors):
            one = lambda x, a: product(x, a)
            shared, own = jax.vmap(one, (None, 0))(x, factors), jax.vmap(one, (0, None), 1)(x, factors[0])
            both = jax.vmap(jax.vmap(one, (0, None)), (None, 0))(x, jnp.sin(factors))
            return jnp.sin(shared).sum() + jnp.cos(own).sum() + jnp.sin(both).sum()

        return lambda x, a: jnp.square(layers(x, a)).sum() + experts(x, a)

    found = jax.jit(partial(seconds, loss(matmul)))(x, factors)
    wanted = jax.jit(lambda *given: seconds(loss(jnp.matmul), *given)[0])(x, factors)
    close(found, [wanted] * 3, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("check", [True, False])
def test_forward_mode_inside_shard_map(check):
    x, a, _ = drawn((8, 3, 6), 2, np.float32)
    b = drawn((2,), 6, np.float32)[1]
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))

    def along(a, b, x):
        return jax.lax.psum(jax.jvp(of_pair, (a, b, x), (b.T, a.T, jnp.cos(x)))[1], "rows")

    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec("rows"))
    mapped = jax.shard_map(along, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check)
    wanted = jax.jvp(of_pair, (a, b, x), (b.T, a.T, jnp.cos(x)))[1]
    np.testing.assert_allclose(jax.jit(mapped)(a, b, x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rows and tokens", "the inputs of A", "what knows no mesh"])
def test_forward_mode_on_a_mesh_with_explicit_axes(name):
    x, a, _ = drawn((8, 4, 6), 2, np.float32)
    b = drawn((2,), 6, np.float32)[1]
    product = jax.jit(lambda *given: jax.jvp(jax.grad(of_pair, (0, 1, 2)), given, jax.tree.map(jnp.cos, given))[1])
    wanted = product(a, b, x)
    with jax.set_mesh(jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)):
        specs = [None if axes is None else PartitionSpec(*axes) for axes in EXPLICIT[name]]
        x, a, b = (v if s is None else jax.device_put(v, s) for v, s in zip((x, a, b), specs, strict=True))
        found = product(a, b, x)
    close(found, wanted, rtol=1e-4, atol=1e-5)
