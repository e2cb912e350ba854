"""The forms in which a convolution's kernel is changed: the path, counts, ranks, kernels of 1 x 1, what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, describe, init_adapters, merge, to_lora
from tests.helpers import jit, largest_difference, random_params
from tests.lora.test_parametrizations import moved

K, IN, OUT, R = 3, 4, 6, 2
FORMS = {  # numbers trained at a kernel (K, K, n, m)
    "lora": lambda n, m: R * (K * K * n + m),
    "cp": lambda n, m: R * (K + K + n + m),
    "lora_c": lambda n, m: R * K * K * (n + m),
    "dora": lambda n, m: R * (K * K * n + m) + m,
    "cp_dora": lambda n, m: R * (K + K + n + m) + m,
    "dora_c": lambda n, m: R * K * K * (n + m) + m,
}


class Convolutions(nn.Module):
    """Strides, dilations and paddings."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(OUT, (K, K), strides=(2, 1), padding=((2, 1), (0, 2)), name="strided")(x))
        x = nn.tanh(nn.Conv(IN, (K, K), kernel_dilation=2, padding="SAME", use_bias=False, name="dilated")(x))
        return nn.Conv(OUT, (K, K), padding="CIRCULAR", name="circular")(x)


def spec_of(name, **more):
    return LoraSpec(parametrization=name, rank=R, target_modules="all-linear", **more)


def conv(kernel):
    return {"m": {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}}


@pytest.mark.parametrize("name", FORMS)
def test_the_path_is_the_convolution_with_the_merged_kernel(name):
    """It starts as the base, and its twin in LoRA or DoRA is the same function."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 7, IN)), jnp.float32)
    model, spec = Convolutions(), spec_of(name, in_axes={"dilated": (0, 1, 2)})  # no bias tells them
    params = random_params(model, x)
    start = init_adapters(jax.random.key(0), params, spec)
    adapters, lora, plain = moved(start), adapted(model, spec), to_lora(moved(start), spec, params=params)

    @jit
    def run(start, adapters):
        whole = merge(params, adapters, spec)
        path = [lora.apply({"params": params, "lora": a}, x) for a in (start, adapters)]
        return *path, *(model.apply({"params": p}, x) for p in (params, whole, merge(params, *plain)))

    begun, found, base, merged, converted = run(start, adapters)
    assert largest_difference(begun, base) < 1e-6 and largest_difference(merged, base) > 1e-2
    assert largest_difference(found, merged) < 1e-5 and largest_difference(converted, merged) < 1e-5
    count = sum(FORMS[name](*size) for size in ((IN, OUT), (OUT, IN), (IN, OUT)))
    assert f"trainable params: {count:,} ||" in describe(params, start, spec)


def changes(name):
    """Of one kernel, as a matrix (outputs, K K IN), in float64."""
    params, spec = conv(jnp.zeros((K, K, IN, OUT))), spec_of(name)
    merged = merge(params, moved(init_adapters(jax.random.key(0), params, spec)), spec)
    return np.asarray(merged["m"]["kernel"], np.float64)


def test_ranks():
    """That of the block form is not R: of CP, no unfolding of the kernel has more."""
    rank = lambda kernel, axis: np.linalg.matrix_rank(
        np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1), 1e-5
    )
    assert [rank(changes("cp"), axis) for axis in range(4)] == [R] * 4
    assert rank(changes("lora"), 3) == R < rank(changes("lora_c"), 3) == OUT


@pytest.mark.parametrize("name", ["cp", "lora_c"])
def test_of_a_kernel_of_one_by_one_it_is_lora(name):
    """The same pair changes a Dense kernel: of CP up to the numbers of the axes of size 1."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(IN, OUT)), jnp.float32)
    small, dense = conv(kernel[None, None]), conv(kernel)
    spec = LoraSpec(parametrization=name, rank=R, target_modules=["m"], stacked=())
    own = moved(init_adapters(jax.random.key(0), small, spec))["m"]
    if name == "cp":
        pair = {"lora_in_0": own["lora_in_0"] * own["lora_in_1"] * own["lora_in_2"], "lora_out": own["lora_out"]}
        a, b = pair.values()
    else:
        pair, a, b = own, own["lora_down"].T, own["lora_up"].T
    lora = LoraSpec(rank=R, target_modules=["m"], stacked=())
    expected = merge(dense, {"m": {"lora_a": a, "lora_b": b}}, lora)["m"]["kernel"]
    assert largest_difference(merge(small, {"m": own}, spec)["m"]["kernel"][0, 0], expected) < 1e-6
    assert largest_difference(merge(dense, {"m": pair}, spec)["m"]["kernel"], expected) < 1e-6


@pytest.mark.parametrize("name", ["dora", "cp_dora", "dora_c"])
def test_magnitudes_are_the_norms_of_the_outputs(name):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(K, K, IN, OUT)), jnp.float32)
    params, spec = conv(kernel), spec_of(name)
    start = init_adapters(jax.random.key(0), params, spec)
    norms = lambda kernel: np.sqrt(np.square(kernel).sum((0, 1, 2)))
    np.testing.assert_allclose(start["m"]["lora_magnitude_vector"], norms(kernel), rtol=1e-5)
    adapters = moved(start)
    found = merge(params, adapters, spec)["m"]["kernel"]
    np.testing.assert_allclose(norms(found), adapters["m"]["lora_magnitude_vector"], rtol=1e-5)


def test_cps_product_starts_with_the_deviation_of_loras_a():
    params = conv(jnp.zeros((5, 7, 40, 8)))
    spec = LoraSpec(parametrization="cp", rank=64, target_modules=["m"], stacked=())
    plain, _ = to_lora(init_adapters(jax.random.key(0), params, spec), spec, params=params)
    np.testing.assert_allclose(plain["m"]["lora_a"].std(), (3 * 5 * 7 * 40) ** -0.5, rtol=0.1)


@pytest.mark.parametrize("axes", [(3, 5, IN), (3, IN), (2, 2, 2, IN)])
@pytest.mark.parametrize("name", ["lora_c", "dora_c"])
def test_the_block_form_is_of_square_kernels(name, axes):
    params, spec = conv(jnp.ones((*axes, OUT))), spec_of(name)
    with pytest.raises(InputError, match=r"^m: lora_c is for kernels \(k, k, in, out\), not .* contracts \("):
        init_adapters(jax.random.key(0), params, spec)
