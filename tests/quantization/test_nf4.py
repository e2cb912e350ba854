"""NF4's bytes against bitsandbytes and against an independent transcription; its error, size and corner cases."""

import zlib
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax.quantization import dequantize, nf4, quantize
from tests.helpers import exact_jit
from tests.quantization import golden

SHAPES = {"blocks": (192, 128), "across_rows": (48, 172), "odd": (5, 7), "one_row": (1, 640)}
encode = jax.jit(nf4.encode, static_argnums=1)


def weight(shape, seed=0, kind="normal"):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return w * (np.random.default_rng(1).random(shape).astype(np.float32) ** 8 if kind == "heavy" else 1)


def test_levels_are_quantiles_of_the_normal_distribution():
    assert np.array_equal(nf4.LEVELS, golden.LEVELS.astype(np.float32))
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]  # QLoRA's code: create_normal_map
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    np.testing.assert_allclose(nf4.LEVELS, np.sort([*above, 0.0, *below]) / max(above), atol=3e-7)


def test_map_is_that_of_bitsandbytes():
    assert zlib.crc32(nf4.MAP.tobytes()) == golden.MAP_CRC32
    np.testing.assert_allclose(nf4.MAP, golden.dynamic_map(), atol=6e-8)


def test_bytes_that_bitsandbytes_has_written():
    found = encode(golden.WEIGHT, np.dtype("float32"))
    packed = np.asarray(found.packed).tobytes()
    assert packed.hex().startswith(golden.PACKED_START) and zlib.crc32(packed) == golden.PACKED_CRC32
    assert np.asarray(found.absmax).tobytes().hex() == golden.ABSMAX
    np.testing.assert_allclose(found.nested_absmax, [golden.NESTED_ABSMAX], rtol=1e-6)
    np.testing.assert_allclose(found.nested_offset, golden.NESTED_OFFSET, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_bytes_of_the_transcription(shape, kind):
    w = weight(shape, kind=kind)
    found, wanted = encode(w, np.dtype("float32")), golden.nf4(w)
    assert np.array_equal(found.packed, wanted["packed"])
    assert found.shape == shape[::-1] and found.dtype == jnp.float32 and found.ndim == 2
    for name in ("nested_absmax", "nested_offset"):
        np.testing.assert_allclose(getattr(found, name), wanted[name], rtol=1e-6, atol=1e-6 * np.abs(w).max())
    different = np.asarray(found.absmax) != wanted["absmax"]
    if wanted["scales"].size > 1:  # one scale is its mean, and what is left of it is rounding
        assert different.mean() < 0.01  # where a scale lies between two codes to the last bit


def test_middles_belong_to_the_lower_level():
    middles = golden.MIDDLES.astype(np.float32)
    w = np.concatenate([[1.0], middles, np.nextafter(middles, np.float32(2)), np.zeros(33)]).astype(np.float32)[None]
    packed = np.asarray(encode(w, np.dtype("float32")).packed)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)
    assert codes.tolist() == [15, *range(15), *range(1, 16), *[7] * 33]


def test_error_is_bounded():
    w = weight((256, 192))
    leaf = encode(w, np.dtype("float32"))
    error = np.abs(np.asarray(dequantize(leaf)).T - w).reshape(-1, 64)
    scales, nested = np.abs(w).reshape(-1, 64).max(1), np.repeat(np.asarray(leaf.nested_absmax), 256)[:768]
    half_gap, half_code = np.diff(golden.LEVELS).max() / 2, np.diff(golden.dynamic_map()).max() / 2
    assert (error <= (half_gap * scales + half_code * nested)[:, None] + 1e-6).all()
    assert error.mean() < 0.075  # of a normal distribution, whose mean magnitude is 0.8


def test_bits_are_counted_from_bytes():
    leaf = encode(weight((1024, 1024)), np.dtype("float32"))
    bits = 8 * sum(np.asarray(x).nbytes for x in jax.tree.leaves(leaf)) / 1024**2
    assert bits == 8 * leaf.nbytes / 1024**2 == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024**2 < 4.13


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantising_again_changes_no_level(dtype):
    kernel = jnp.asarray(weight((2, 128, 96)), dtype)
    once = quantize(kernel, "nf4")
    twice = quantize(dequantize(once), "nf4")
    assert np.array_equal(once.packed, twice.packed)
    moved = np.abs(np.asarray(dequantize(twice), np.float32) - np.asarray(dequantize(once), np.float32)).max()
    half_code = np.diff(golden.dynamic_map()).max() / 2
    assert moved <= half_code * float(once.nested_absmax.max()) * 1.1 + 2.0 ** (-23 if dtype == jnp.float32 else -6)


def test_zeros_come_back_as_zeros():
    w = weight((4, 128))
    w[1] = 0
    back = np.asarray(dequantize(encode(w, np.dtype("float32")))).T
    assert (back[1] == 0).all() and np.isfinite(back).all()
    none = encode(np.zeros((3, 64), np.float32), np.dtype("float32"))
    assert (np.asarray(dequantize(none)) == 0).all() and set(np.asarray(none.packed).flat) == {0x77}


def test_a_stack_is_its_layers():
    kernel = jnp.asarray(weight((3, 20, 36)))
    encode = exact_jit(lambda kernel: quantize(kernel, "nf4"))
    stack = encode(kernel)
    for i in range(3):
        for one, all_of_them in zip(*map(jax.tree.leaves, (encode(kernel[i]), stack)), strict=True):
            assert np.array_equal(one, all_of_them[i])
    assert np.array_equal(dequantize(jax.tree.map(lambda x: x[1], stack)), dequantize(stack)[1])
    assert stack.shape == (3, 20, 36) and jax.tree.map(lambda x: x[1], stack).shape == (20, 36)
