"""The content of a tree of arrays has one name, on every layout, and any change gives another."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from stablelora_jax.utils.fingerprint import fingerprint
from tests.helpers import tiny_decoder

U32 = 2**32
RNG = np.random.default_rng(0)
DTYPES = ["bool", "int8", "uint8", "int16", "int32", "uint32", "float16", "bfloat16", "float8_e4m3fn", "float32"]


def one(array):
    return fingerprint({"x": array})["x"]


def drawn(dtype, shape=(4, 6)):
    return RNG.integers(0, 2 if dtype == "bool" else 100, shape).astype(getattr(ml_dtypes, dtype, None) or dtype)


def transcription(words):
    """The two sums, element by element, in Python's own integers."""
    sums = [0, 0]
    for number, (index, word) in enumerate(np.ndenumerate(words)):
        k = int(word) * 0xCC9E2D51 % U32
        k = (k << 15 | k >> 17) % U32 * 0x1B873593 % U32
        odd = sum(i * pow(0x9E3779B1, axis + 1, U32) for axis, i in enumerate(index))
        for which, place in enumerate((1 + number, 0x9747B28C + odd)):
            h = k ^ place % U32
            h = (h ^ h >> 16) * 0x85EBCA6B % U32
            h = (h ^ h >> 13) * 0xC2B2AE35 % U32
            sums[which] = (sums[which] + (h ^ h >> 16)) % U32
    return "".join(f"{s:08x}" for s in sums)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_against_a_transcription(shape):
    x = RNG.normal(size=shape).astype(np.float32)
    assert one(x) == f"float32[{','.join(map(str, shape))}] {transcription(x.view(np.uint32))}"
    wide = RNG.normal(size=shape)
    halves = np.ascontiguousarray(wide).reshape(*shape, 1).view(np.uint32)
    assert one(wide).split()[1] == transcription(halves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_device_agree_and_every_flipped_bit_shows(dtype):
    x = drawn(dtype)
    name = one(x)
    assert name.startswith(f"{dtype}[4,6] ") and one(jnp.asarray(x)) == name
    for bit in range(1 if dtype == "bool" else 8 * x.dtype.itemsize):
        raw = x.copy().view(f"u{x.dtype.itemsize}")
        raw[2, 3] ^= np.array(1 << bit, raw.dtype)
        assert one(raw.view(x.dtype)) != name


def test_64_bits_need_no_64_bit_types(x64):
    for x in (RNG.normal(size=(3, 4)), np.arange(6), np.float64(2.5)):
        wide = one(jnp.asarray(x))
        jax.config.update("jax_enable_x64", False)
        assert one(x) == wide and one(x).startswith(str(x.dtype))
        jax.config.update("jax_enable_x64", True)


def test_what_must_differ_differs():
    x = RNG.normal(size=(4, 6)).astype(np.float32)
    swapped, square = x.copy(), x[:, :4]
    swapped[0, 0], swapped[3, 5] = x[3, 5], x[0, 0]
    for other in (swapped, x[::-1], x[:, ::-1], x.T, x.reshape(6, 4), x.reshape(1, 4, 6), x.astype(np.float16), x[:3]):
        assert one(other) != one(x)
    assert one(square) != one(square.T) and one(np.ones((2, 3))) != one(np.ones((3, 2)))
    assert one(np.float32(0.0)) != one(np.float32(-0.0))
    assert one(np.zeros((0, 3), np.float32)) == "float32[0,3] 0000000000000000"
    assert one(3) == one(np.int64(3)) and one(True) == one(np.True_)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_every_sharding_gives_the_same(axes):
    x, b = drawn("float32", (8, 16, 24)), drawn("bfloat16", (8,))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axes,) * 2)
    for spec in (P(), P("a"), P("a", "b"), P(None, "b", "a"), P(None, None, ("a", "b"))):
        tree = {"x": jax.device_put(x, NamedSharding(mesh, spec)), "b": jax.device_put(b, NamedSharding(mesh, P("a")))}
        assert fingerprint(tree) == fingerprint({"x": x, "b": b})
    part = jax.make_mesh((2,), ("a",), devices=jax.devices()[3:5])
    assert one(jax.device_put(x, NamedSharding(part, P()))) == one(x)


def test_names_are_dotted_and_a_new_leaf_changes_no_other():
    _, params = tiny_decoder()
    before = fingerprint(params)
    assert "model.layers.self_attn.q_proj.kernel" in before and len(before) == len(jax.tree.leaves(params))
    after = fingerprint({**params, "new": np.ones(2)})
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {"new"}


def test_no_copy_is_made():
    from stablelora_jax.utils.fingerprint import _sums

    memory = _sums.lower(jnp.zeros((16, 128, 1024))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1024


def test_another_process_agrees():
    code = "import numpy as np; from stablelora_jax.utils.fingerprint import fingerprint as f\n"
    code += "print(f(np.arange(9.0))[''])"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == fingerprint(np.arange(9.0))[""]
