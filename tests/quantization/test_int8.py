"""int8 against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError
from stablelora_jax.quantization import dequantize, quantize

KERNEL = np.random.default_rng(0).normal(size=(2, 48, 20)).astype(np.float32)  # (L, in, out)


def test_codes_are_those_of_the_definition():
    found = quantize(jnp.asarray(KERNEL), "int8")
    absmax = np.abs(KERNEL.astype(np.float64)).max(1)  # (L, out)
    codes = np.rint(127 * KERNEL.astype(np.float64) / absmax[:, None])
    assert np.array_equal(found.absmax, absmax.astype(np.float32))
    assert np.array_equal(found.codes, codes.swapaxes(1, 2)) and found.codes.dtype == jnp.int8
    np.testing.assert_allclose(dequantize(found), codes / 127 * absmax[:, None], rtol=1e-6)
    assert found.shape == (2, 48, 20) and 8 * found.nbytes == KERNEL.size * (8 + 32 / 48)


def test_error_is_half_a_step():
    error = np.abs(np.asarray(dequantize(quantize(jnp.asarray(KERNEL), "int8"))) - KERNEL)
    assert (error <= np.abs(KERNEL).max(1, keepdims=True) / 127 / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantising_again_changes_no_code(dtype):
    once = quantize(jnp.asarray(KERNEL, dtype), "int8")
    twice = quantize(dequantize(once), "int8")
    assert np.array_equal(once.codes, twice.codes)
    np.testing.assert_allclose(once.absmax, twice.absmax, rtol=2e-7)  # one bit, by the order of two products
    assert dequantize(once).dtype == dtype


def test_a_channel_of_zeros_comes_back_as_zeros():
    kernel = KERNEL.copy()
    kernel[0, :, 3] = 0
    back = np.asarray(jax.jit(lambda k: dequantize(quantize(k, "int8")))(kernel))
    assert (back[0, :, 3] == 0).all() and np.isfinite(back).all()


def test_kinds_have_names():
    with pytest.raises(InputError, match="quantize must be one of int8, nf4, not 'fp4'"):
        quantize(jnp.asarray(KERNEL), "fp4")
