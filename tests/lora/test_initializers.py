"""The laws of an initialisation, for every member, and what each says of its factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, adapted, init_adapters, merge
from stablelora_jax.lora.initializers import INITIALIZERS, ONE_IS_ZERO, READ_KERNEL
from stablelora_jax.utils.errors import InputError
from tests.helpers import largest_difference, tiny_decoder

N, M, R = 9, 7, 4
S = 2.0
KEEPS = ("init_ab", "pissa", "pissa_niter_4", "milora", "olora", "svd")  # its product subtracted
OFF = ("init_ab_off",)  # the one that does not start at the base


def kernel(n=N, m=M, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(5).normal(size=(n, m)), dtype)


def start(name, w, rank=R, key=0):
    leaves = INITIALIZERS[name](jax.random.key(key), w, rank, jnp.asarray(S, w.dtype), w.dtype)
    return {key: np.asarray(leaf) for key, leaf in leaves.items()}


def change(leaves):
    kept = leaves["frozen_a"] @ leaves["frozen_b"] if "frozen_a" in leaves else 0
    return S * (leaves["lora_a"] @ leaves["lora_b"] - kept)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_start_is_the_base_and_depends_on_the_key_alone(name):
    w = kernel()
    leaves = start(name, w)
    assert (np.abs(change(leaves)).max() < 1e-6) == (name not in OFF)
    assert ("frozen_a" in leaves) == (name in KEEPS)
    zero = [not leaves[factor].any() for factor in ("lora_a", "lora_b")]
    assert sum(zero) == (name in ONE_IS_ZERO)
    again, other = start(name, w), start(name, w, key=1)
    assert all(np.array_equal(leaf, again[key]) for key, leaf in leaves.items())
    assert largest_difference(leaves, other) < 1e-4 or name not in READ_KERNEL
    assert largest_difference(leaves, other) > 1e-3 or name in READ_KERNEL
    assert {key: leaf.shape for key, leaf in leaves.items() if key in ("lora_a", "lora_b")} == {
        "lora_a": (N, R),
        "lora_b": (R, M),
    }


@pytest.mark.parametrize("name", INITIALIZERS)
def test_in_a_bfloat16_model_the_start_is_the_base_and_merging_is_the_path(name):
    """Where the base itself was moved, it would be rounded."""
    model, params = tiny_decoder(jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    spec = LoraSpec(rank=R, init=name, target_modules=["q_proj", "down_proj", "embed_tokens"])
    adapters = init_adapters(jax.random.key(0), params, spec)
    if name not in OFF:
        assert largest_difference(merge(params, adapters, spec), params) == 0
    tokens = jnp.arange(10).reshape(2, 5)
    found = adapted(model, spec).apply({"params": params, "lora": adapters}, tokens)
    expected = model.apply({"params": merge(params, adapters, spec)}, tokens)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=0.1)


@pytest.mark.parametrize("name", ["kaiming", "init_ab", "pissa", "milora", "olora", "svd"])
def test_a_layer_of_a_lower_rank_starts_as_alone(name):
    kernels = jnp.stack([kernel(), 2 * kernel()])
    stacked = {"model": {"layers": {"q_proj": {"kernel": kernels}}}}
    spec = LoraSpec(rank=R, init=name, target_modules=["q_proj"], rank_pattern={"layers.1.q_proj": 2}, scaling="none")
    found = init_adapters(jax.random.key(0), stacked, spec)
    np.testing.assert_allclose(merge(stacked, found, spec)["model"]["layers"]["q_proj"]["kernel"], kernels, atol=1e-5)
    pair = found["model"]["layers"]["q_proj"]
    assert not pair["lora_a"][1, :, 2:].any() and not pair["lora_b"][1, 2:].any()
    if name in READ_KERNEL:
        alone = INITIALIZERS[name](jax.random.key(0), kernels[1], 2, jnp.ones(()), jnp.float32)
        np.testing.assert_allclose(pair["lora_a"][1, :, :2], alone["lora_a"], atol=1e-5)


def test_uniform_and_normal_starts_have_their_spread():
    wide = jax.ShapeDtypeStruct((400, 500), jnp.float32)
    draw = lambda name: INITIALIZERS[name](jax.random.key(0), wide, 8, 1.0, jnp.float32)
    bound = 400**-0.5
    assert 0.98 * bound < np.abs(draw("kaiming")["lora_a"]).max() <= bound
    assert 0.98 * bound < np.abs(draw("init_ab")["lora_b"]).max() <= bound
    assert all(np.array_equal(leaf, draw("init_ab")[key]) for key, leaf in draw("init_ab_off").items())
    assert np.std(draw("gaussian")["lora_a"]) == pytest.approx(1 / 8, rel=0.05)
    assert np.std(draw("init_b")["lora_b"]) == pytest.approx(8**-0.5, rel=0.05)


def test_orthogonal_factors_meet_in_nothing_and_want_an_even_rank():
    leaves = start("orthogonal", kernel())
    assert np.abs(leaves["lora_a"] @ leaves["lora_b"]).max() < 1e-6 < 1e-2 < np.abs(leaves["lora_b"]).max()
    with pytest.raises(InputError, match="must be even, not 3"):
        start("orthogonal", kernel(), rank=3)


@pytest.mark.parametrize("size", [(N, M), (M, N)])
def test_pissa_takes_the_principal_part(size, x64):
    w = kernel(*size, jnp.float64)
    leaves = start("pissa", w)
    values = np.linalg.svd(w, compute_uv=False)
    residual = np.linalg.svd(w - S * leaves["lora_a"] @ leaves["lora_b"], compute_uv=False)
    np.testing.assert_allclose(residual[: min(size) - R], values[R:], atol=1e-12)
    np.testing.assert_allclose(residual[min(size) - R :], 0, atol=1e-12)
    assert np.linalg.norm(leaves["lora_a"]) == pytest.approx(np.linalg.norm(leaves["lora_b"]))


def test_a_randomised_decomposition_is_close_to_the_exact_one(x64):
    """Of a kernel 60 x 50 whose singular values fall."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 50)))[0] for n in (60, 50))
    w = jnp.asarray(u * 0.8 ** np.arange(50)[None] @ v.T)
    exact, fast = (start(name, w) for name in ("pissa", "pissa_niter_4"))
    np.testing.assert_allclose(fast["lora_a"] @ fast["lora_b"], exact["lora_a"] @ exact["lora_b"], atol=1e-3)


def test_pissa_of_more_rank_than_there_is_leaves_the_rest_zero():
    leaves = start("pissa", kernel(3, 5))
    assert not leaves["lora_a"][:, 3].any() and not leaves["lora_b"][3].any()


def test_milora_leaves_the_principal_part(x64):
    w = kernel(dtype=jnp.float64)
    leaves = start("milora", w)
    values = np.linalg.svd(w, compute_uv=False)
    residual = np.linalg.svd(w - S * leaves["lora_a"] @ leaves["lora_b"], compute_uv=False)
    np.testing.assert_allclose(residual[: M - R], values[: M - R], atol=1e-12)
    own = np.linalg.svd(S * leaves["lora_a"] @ leaves["lora_b"], compute_uv=False)
    np.testing.assert_allclose(own[:R], values[M - R :], atol=1e-12)


@pytest.mark.parametrize("size", [(N, M), (M, N)])
def test_olora_takes_the_first_columns_of_q(size, x64):
    w = kernel(*size, jnp.float64)
    leaves = start("olora", w)
    q, r = np.linalg.qr(np.asarray(w).T)
    np.testing.assert_allclose(leaves["lora_a"] @ leaves["lora_b"], (q[:, :R] @ r[:R]).T, atol=1e-12)
    np.testing.assert_allclose(leaves["lora_b"] @ leaves["lora_b"].T, np.eye(R), atol=1e-12)


def test_svd_has_its_singular_values_in_a(x64):
    w = kernel(dtype=jnp.float64)
    leaves = start("svd", w)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(leaves["lora_a"] @ leaves["lora_b"], u[:, :R] * s[None, :R] @ vt[:R], atol=1e-12)
    np.testing.assert_allclose(leaves["lora_b"] @ leaves["lora_b"].T, np.eye(R), atol=1e-12)


@pytest.mark.parametrize("name", ["milora", "olora", "svd"])
def test_more_rank_than_there_is_is_refused(name):
    with pytest.raises(InputError, match="lower the rank"):
        start(name, kernel(3, 5))
    params = {"q_proj": {"kernel": kernel(3, 5)}}
    with pytest.raises(InputError, match=f"q_proj: init='{name}' takes 4 directions of a kernel .3, 5.: lower"):
        init_adapters(jax.random.key(0), params, LoraSpec(rank=R, init=name, target_modules=["q_proj"]))


@pytest.mark.parametrize("name", READ_KERNEL)
def test_shapes_alone_do_not_do_where_the_kernel_is_read(name):
    shapes = {"q_proj": {"kernel": jax.ShapeDtypeStruct((N, M), jnp.float32)}}
    with pytest.raises(InputError, match="starts from the values of q_proj, not only its shape"):
        init_adapters(jax.random.key(0), shapes, LoraSpec(rank=R, init=name, target_modules=["q_proj"]))
