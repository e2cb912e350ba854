"""The cases of qwix's own LoRA tests, asked of this package.

Source of the cases (not of the code): ``tests/_src/providers/lora_test.py`` of google/qwix, class ``LoraTest``. Where
the two differ by design, the test says so: qwix keeps the axes of a kernel in its factors, here they are flattened;
qwix passes over what it cannot adapt, here that is an ``InputError``; qwix puts the pair into the module, here it is
apart.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stablelora_jax import InputError, LoraSpec, adapted
from stablelora_jax.quantization import dequantize, quantize

SPEC = LoraSpec(target_modules="all-linear", rank=3, alpha=6)
SCALE = 2.0


def weights_of(module):
    return nnx.state(module, nnx.Param)


def with_ones(adapters):
    """``adapters`` with B of ones, as qwix's tests start them."""
    at = lambda path, x: jnp.ones_like(x) if path[-1].key == "lora_b" else x
    return jax.tree_util.tree_map_with_path(at, adapters)


def shapes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x.shape for path, x in jax.tree.leaves_with_path(tree)
    }


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("text", "lhs", "rhs", "a", "b", "low_rank"),
    [
        ("BTD,DNH->BTNH", (16, 4, 12), (12, 10, 8), (12, 3), (3, 80), "BTD,Dr,rNH->BTNH"),
        ("bjir,bnmjr->bimn", (16, 4, 12, 5), (16, 10, 8, 4, 5), (16, 20, 3), (16, 3, 80), "bjir,bjrA,bAnm->bimn"),
        (" ABD, DNH -> ABNH", (5, 16, 12), (12, 10, 8), (12, 3), (3, 80), "ABD,Dr,rNH->ABNH"),
    ],
    ids=["heads", "batch", "spaces"],
)
def test_strings_of_einsum(text, lhs, rhs, a, b, low_rank):
    """``test_parse_einsum_str_for_lora``. Over a batch axis qwix shares B (second case); here each index has one."""
    x, params = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((lhs, rhs)))
    lora = adapted(lambda p, x: jnp.einsum(text, x, p["w"]), SPEC)
    adapters = with_ones(lora.init(jax.random.key(2), {"w": params}, x))
    assert shapes(adapters) == {"w.lora_a": a, "w.lora_b": b}
    split = {"D": (12,), "N": (10,), "H": (8,), "b": (16,), "j": (4,), "r": (5,), "n": (10,), "m": (8,)}
    _, first, second = low_rank.split("->")[0].split(",")
    rank = {"r"} if "D" in text else {"A"}
    size = lambda letters: [3 if letter in rank else split[letter][0] for letter in letters]
    pair = adapters["w"]
    change = jnp.einsum(low_rank, x, pair["lora_a"].reshape(size(first)), pair["lora_b"].reshape(size(second)))
    y = lora.apply({"params": {"w": params}, "lora": adapters}, x)
    close(y, jnp.einsum(text, x, params) + SCALE * change)


@pytest.mark.parametrize("text", ["BTD,DNH->BTNH->BTNH", "BTD->BTNH"])
def test_strings_that_are_no_einsum(text):
    """``test_parse_einsum_str_for_lora_invalid_einsum_str``: the error is jnp.einsum's."""
    lora = adapted(lambda p, x: jnp.einsum(text, x, p["w"]), SPEC)
    with pytest.raises(ValueError, match=r"."):
        lora.init(jax.random.key(0), {"w": jnp.ones((12, 10, 8))}, jnp.ones((16, 4, 12)))


class Holder(nnx.Module):
    """One module inside another, so that it has a name."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


def linear():
    return nnx.Linear(12, 10, rngs=nnx.Rngs(0))


def einsum():
    return nnx.Einsum("btd,dnh->btnh", (12, 8, 10), (8, 10), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [linear, einsum])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_linear_and_einsum(make, rate):
    """``test_lora_dot_general_nnx`` and ``test_lora_einsum_nnx``. A rate of 1 is refused here: the masks are read off.

    The input is the identity: row i of the change is ``A[i] B`` times a mask of 0 or ``1 / (1 - rate)``.
    """
    model, x = Holder(make()), jnp.eye(12) if make is linear else jnp.eye(12)[None]
    lora = adapted(model, LoraSpec(target_modules=["inner"], rank=3, alpha=1.5, dropout=rate))
    params = weights_of(model)
    adapters = with_ones(lora.init(jax.random.key(1), params, x))
    out = 10 if make is linear else 80
    assert shapes(adapters) == {"inner.lora_a": (12, 3), "inner.lora_b": (3, out)}
    variables = {"params": params, "lora": adapters}
    whole = 0.5 * adapters["inner"]["lora_a"] @ adapters["inner"]["lora_b"]
    change = lambda rngs: (lora.apply(variables, x, rngs=rngs) - model(x)).reshape(12, out)
    close(change(None), whole)
    if rate:
        masks = change({"dropout": jax.random.key(3)}) / whole
        close(masks, jnp.round(masks))
        assert set(np.unique(jnp.round(masks))) == {0, 2} and bool((masks[:, :1] - masks < 1e-3).all())


def test_gradients_under_jit():
    """What both tests do with ``nnx.grad`` under ``nnx.jit``, here with jax's own: the base is not differentiated."""
    model, x = Holder(linear()), jnp.ones((10, 12))
    lora, params = adapted(model, SPEC), weights_of(model)
    adapters = with_ones(lora.init(jax.random.key(1), params, x))

    @jax.jit
    def gradient(adapters):
        return jax.grad(lambda a: jnp.abs(lora.apply({"params": params, "lora": a}, x)).sum())(adapters)

    plain = lambda pair: jnp.abs(model(x) + SCALE * x @ pair["lora_a"] @ pair["lora_b"]).sum()
    jax.tree.map(close, gradient(adapters)["inner"], jax.grad(plain)(adapters["inner"]))


def mesh_of(*names):
    return jax.make_mesh((2, 2), names, axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("sharded_base", [True, False])
def test_einsum_sharded(kind, sharded_base):
    """``test_lora_einsum_nnx_sharded``: QLoRA on a mesh. qwix's int4 is int8 here."""
    mesh = mesh_of("fsdp", "tp")
    params = {"inner": {"kernel": jax.random.normal(jax.random.key(0), (16, 8, 10)), "bias": jnp.ones((8, 10))}}
    dense = params
    if kind:  # formats are of matrices
        leaf = quantize(params["inner"]["kernel"].reshape(16, 80), kind)
        params = {"inner": {"kernel": leaf, "bias": params["inner"]["bias"]}}
        dense = {"inner": {"kernel": dequantize(leaf), "bias": params["inner"]["bias"]}}
    elif sharded_base:
        place = {"kernel": P("fsdp", "tp", None), "bias": P("tp", None)}
        params = {"inner": {n: jax.device_put(params["inner"][n], NamedSharding(mesh, place[n])) for n in place}}

    def fn(params, x):
        own = params["inner"]
        return jnp.einsum("btd,dnh->btnh", x, own["kernel"].reshape(16, 8, 10)) + own["bias"][None, None]

    lora = adapted(fn, SPEC)
    x = jax.random.normal(jax.random.key(1), (16, 4, 16))
    adapters = with_ones(lora.init(jax.random.key(2), params, x))
    assert shapes(adapters) == {"inner.lora_a": (16, 3), "inner.lora_b": (3, 80)}
    want = fn(dense, x) + SCALE * (x @ adapters["inner"]["lora_a"] @ adapters["inner"]["lora_b"]).reshape(16, 4, 8, 10)
    x = jax.device_put(x, NamedSharding(mesh, P("fsdp", None, None)))
    y = jax.jit(lambda a, p, x: lora.apply({"params": p, "lora": a}, x))(adapters, params, x)
    close(np.asarray(y), np.asarray(want))
    if sharded_base and not kind:
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp", None, "tp")), y.ndim)
    merged = lora.merge(dense, adapters)
    close(np.asarray(y), np.asarray(fn(merged, np.asarray(x))))


def test_einsum_with_partitioning():
    """The same, with an ``nnx.Einsum`` that carries its sharding as metadata: adapters and merging keep it."""
    mesh, init = mesh_of("fsdp", "tp"), nnx.with_partitioning
    with jax.set_mesh(mesh):
        inner = nnx.Einsum(
            "btd,dnh->btnh",
            (16, 8, 10),
            (8, 10),
            rngs=nnx.Rngs(0),
            kernel_init=init(nnx.initializers.lecun_normal(), ("fsdp", "tp", None)),
            bias_init=init(nnx.initializers.zeros, ("tp", None)),
        )
        model = Holder(inner)
        params, x = weights_of(model), jnp.ones((16, 4, 16))
        lora = adapted(model, SPEC)
        adapters = with_ones(lora.init(jax.random.key(0), params, x))
        y = lora.apply({"params": params, "lora": adapters}, x)
        merged = lora.merge(params, adapters)
        again = nnx.merge(nnx.graphdef(model), merged)(x)
    close(np.asarray(y), np.asarray(again))
    assert isinstance(merged, nnx.State)
    assert merged.inner.kernel.get_metadata() == params.inner.kernel.get_metadata()


@pytest.mark.parametrize("kind", [None, "int8"])
def test_dense_with_partitioning(kind):
    """``test_lora_dot_general_nn``: a Linen Dense whose kernel is boxed as ``nn.Partitioned``."""
    dense = nn.Dense(32, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("a", "b")), name="fc")
    x = jax.random.normal(jax.random.key(1), (10, 16))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32, kernel_init=dense.kernel_init, name="fc")(x)

    boxed = Model().init(jax.random.key(0), x)["params"]
    params = nn.unbox(boxed)
    if kind:
        params = {"fc": {**params["fc"], "kernel": quantize(params["fc"]["kernel"], kind)}}
    lora = adapted(Model(), SPEC)
    adapters = with_ones(lora.init(jax.random.key(2), params, x))
    assert shapes(adapters) == {"fc.lora_a": (16, 3), "fc.lora_b": (3, 32)}
    y = lora.apply({"params": params, "lora": adapters}, x)
    kernel = dequantize(params["fc"]["kernel"]) if kind else params["fc"]["kernel"]
    close(y, x @ kernel + SCALE * x @ adapters["fc"]["lora_a"] @ adapters["fc"]["lora_b"])
    if not kind:
        with pytest.raises(InputError, match="unbox"):  # qwix keeps the boxes
            lora.init(jax.random.key(2), boxed, x)


class Batched(nnx.Module):
    """A product with a batch axis, and any number of output axes."""

    def __init__(self, *shape):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), shape))

    def __call__(self, x):
        return jax.lax.dot_general(x, self.kernel[...], (((2,), (1,)), ((0,), (0,))))


@pytest.mark.parametrize("out", [(16,), (4, 4)], ids=["one_output", "several"])
def test_batch_axes(out):
    """``test_lora_dot_general_batch`` and ``test_lora_dot_general_multi_out_dim``: a pair for each of the batch."""
    model, x = Holder(Batched(2, 8, *out)), jax.random.normal(jax.random.key(1), (2, 4, 8))
    lora, params = adapted(model, SPEC), weights_of(model)
    adapters = with_ones(lora.init(jax.random.key(2), params, x))
    assert shapes(adapters) == {"inner.lora_a": (2, 8, 3), "inner.lora_b": (2, 3, 16)}
    change = x @ adapters["inner"]["lora_a"] @ adapters["inner"]["lora_b"]
    y = lora.apply({"params": params, "lora": adapters}, x)
    close(y, model(x) + SCALE * change.reshape(2, 4, *out))


def test_no_weight():
    """``test_lora_dot_general_no_weight``: qwix returns a model without adapters; here nothing to adapt is an error."""
    with pytest.raises(InputError, match=r"selects no"):
        adapted(lambda p, x: x @ jnp.ones((8, 8)), SPEC).init(jax.random.key(0), {}, jnp.ones((1, 8)))


def test_no_axis_remains():
    """``test_lora_dot_general_no_remain``: a vector that is contracted whole has no pair; the others have theirs."""
    params = {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones(8)}}
    lora = adapted(lambda p, x: (x @ p["a"]["kernel"]) @ p["b"]["kernel"], SPEC)
    adapters = lora.init(jax.random.key(0), params, jnp.ones(8))
    assert set(adapters) == {"a"}
    assert lora.apply({"params": params, "lora": adapters}, jnp.ones(8)).shape == ()


def test_conv_linen():
    """``test_lora_conv_nn``: A has the window and the input channels, flattened; qwix keeps them as axes."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(32, (3, 3), name="conv")(x)

    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 16))
    params, lora = Model().init(jax.random.key(1), x)["params"], adapted(Model(), SPEC)
    conv_like_qwix(lora, params, x, lambda params: Model().apply({"params": params}, x))


def test_conv_nnx():
    """``test_lora_conv_nnx``, on a mesh."""
    mesh = mesh_of("in", "out")
    model = Holder(nnx.Conv(16, 32, kernel_size=(3, 3), rngs=nnx.Rngs(0)))
    params, graphdef = weights_of(model), nnx.graphdef(model)
    place = jax.tree.map(lambda x: P(None, None, "in", "out") if x.ndim == 4 else P("out"), params)
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, place)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 16))
    conv_like_qwix(adapted(model, SPEC), params, x, lambda params: nnx.merge(graphdef, params)(x))


def conv_like_qwix(lora, params, x, base):
    adapters = with_ones(lora.init(jax.random.key(2), params, x))
    (name,) = adapters
    assert shapes(adapters) == {f"{name}.lora_a": (3 * 3 * 16, 3), f"{name}.lora_b": (3, 32)}
    y = jax.jit(lambda params, a, x: lora.apply({"params": params, "lora": a}, x))(params, adapters, x)
    low = jax.lax.conv_general_dilated(
        x, adapters[name]["lora_a"].reshape(3, 3, 16, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    close(np.asarray(y), np.asarray(base(params)) + SCALE * np.asarray(low @ adapters[name]["lora_b"]))
    close(np.asarray(y), np.asarray(base(lora.merge(params, adapters))))


def test_remat():
    """``test_nnx_remat``: a method of a submodule under ``nnx.remat``."""

    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(16, 32, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.remat(type(self.linear).__call__)(self.linear, x)

    model, x = Model(), jax.random.normal(jax.random.key(0), (10, 16))
    lora, params = adapted(model, SPEC), weights_of(model)
    adapters = with_ones(lora.init(jax.random.key(1), params, x))
    assert shapes(adapters) == {"linear.lora_a": (16, 3), "linear.lora_b": (3, 32)}
    y = lora.apply({"params": params, "lora": adapters}, x)
    close(y, model(x) + SCALE * x @ adapters["linear"]["lora_a"] @ adapters["linear"]["lora_b"])
