"""The laws of an initialisation, for every member, and what each says of its factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, adapted, init_adapters, merge
from stablelora_jax.lora.initializers import (
    CALIBRATED,
    INITIALIZERS,
    OFF_BASE,
    ONE_IS_ZERO,
    READ_KERNEL,
    READ_KERNELS,
)
from stablelora_jax.lora.initializers.cora import common
from stablelora_jax.lora.initializers.lora_ga import GAMMA
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.parametrizations.lora import Keys
from stablelora_jax.utils.errors import InputError
from tests.helpers import largest_difference, random_calibration, tiny_decoder

N, M, R = 9, 8, 4
S = 2.0
KEEPS = ("init_ab", "pissa", "pissa_niter_4", "milora", "nystrom", "olora", "svd", "lora_ga")  # its product subtracted
READ = (*READ_KERNEL, *READ_KERNELS, *CALIBRATED)  # values, not a shape and a key


def kernel(n=N, m=M, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(5).normal(size=(n, m)), dtype)


def start(name, w, rank=R, key=0):
    leaves = INITIALIZERS[name](jax.random.key(key), w, rank, jnp.asarray(S, w.dtype), w.dtype)
    return {key: np.asarray(leaf) for key, leaf in leaves.items()}


def change(leaves):
    kept = leaves["frozen_a"] @ leaves["frozen_b"] if "frozen_a" in leaves else 0
    return S * (leaves["lora_a"] @ leaves.get("lora_r", np.eye(R)) @ leaves["lora_b"] - kept)


def spec_of(name, **given):
    parametrization = {"lora_sb": "lora_xs", "nystrom": "slora"}.get(name, "lora")
    return LoraSpec(**{"rank": R, "init": name, "parametrization": parametrization, **given})


@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_start_is_the_base_and_depends_on_the_key_alone(name):
    w = kernel()
    leaves = start(name, w)
    assert (np.abs(change(leaves)).max() < 1e-6) == (name not in OFF_BASE)
    assert ("frozen_a" in leaves) == (name in KEEPS)
    zero = [not leaves[factor].any() for factor in ("lora_a", "lora_b")]
    assert sum(zero) == (name in ONE_IS_ZERO)
    again, other = start(name, w), start(name, w, key=1)
    assert all(np.array_equal(leaf, again[key]) for key, leaf in leaves.items())
    assert largest_difference(leaves, other) < 1e-4 or name not in READ
    assert largest_difference(leaves, other) > 1e-3 or name in READ
    assert {key: leaf.shape for key, leaf in leaves.items() if key in ("lora_a", "lora_b")} == {
        "lora_a": (N, R),
        "lora_b": (R, M),
    }


@pytest.mark.parametrize("name", INITIALIZERS)
def test_in_a_bfloat16_model_the_start_is_the_base_and_merging_is_the_path(name):
    """Where the base itself was moved, it would be rounded."""
    model, params = tiny_decoder(jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    spec = spec_of(name, target_modules=["q_proj", "down_proj", "embed_tokens"])
    adapters = init_adapters(jax.random.key(0), params, spec, calibration=random_calibration(params, spec))
    if name not in OFF_BASE:
        assert largest_difference(merge(params, adapters, spec), params) == 0
    tokens = jnp.arange(10).reshape(2, 5)
    found = adapted(model, spec).apply({"params": params, "lora": adapters}, tokens)
    expected = model.apply({"params": merge(params, adapters, spec)}, tokens)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=0.1)


@pytest.mark.parametrize(
    "name", ["kaiming", "init_ab", "pissa", "milora", "olora", "svd", "cora", "lora_ga", "eva", "loftq"]
)
def test_a_layer_of_a_lower_rank_starts_as_alone(name):
    kernels = jnp.stack([kernel(), 2 * kernel()])
    stacked = {"model": {"layers": {"q_proj": {"kernel": kernels}}}}
    spec = LoraSpec(rank=R, init=name, target_modules=["q_proj"], rank_pattern={"layers.1.q_proj": 2}, scaling="none")
    calibration = random_calibration(stacked, spec)
    found = init_adapters(jax.random.key(0), stacked, spec, calibration=calibration)
    if name not in OFF_BASE:
        merged = merge(stacked, found, spec)["model"]["layers"]["q_proj"]["kernel"]
        np.testing.assert_allclose(merged, kernels, atol=1e-5)
    pair = found["model"]["layers"]["q_proj"]
    assert not pair["lora_a"][1, :, 2:].any() and not pair["lora_b"][1, 2:].any()
    if name in READ:
        read = kernels[1] if name in READ_KERNEL else common([kernels])
        if calibration is not None:
            read = calibration["model"]["layers"]["q_proj"][CALIBRATED[name]][1]
        alone = INITIALIZERS[name](jax.random.key(0), read, 2, jnp.ones(()), jnp.float32)
        np.testing.assert_allclose(pair["lora_a"][1, :, :2], alone["lora_a"], atol=1e-5)
        np.testing.assert_allclose(pair["lora_b"][1, :2], alone["lora_b"], atol=1e-5)


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


@pytest.mark.parametrize("name", ["milora", "nystrom", "olora", "svd", *READ_KERNELS, *CALIBRATED])
def test_more_rank_than_there_is_is_refused(name):
    with pytest.raises(InputError, match="lower the rank"):
        start(name, kernel(3, 5))
    params, taken = {"q_proj": {"kernel": kernel(3, 5)}}, 8 if name == "lora_ga" else 4
    with pytest.raises(InputError, match=f"q_proj: init='{name}' takes {taken} directions of a kernel .3, 5.: lower"):
        init_adapters(jax.random.key(0), params, spec_of(name, target_modules=["q_proj"]))


@pytest.mark.parametrize("name", [*READ_KERNEL, *READ_KERNELS])
def test_shapes_alone_do_not_do_where_the_kernel_is_read(name):
    shapes = {"q_proj": {"kernel": jax.ShapeDtypeStruct((N, M), jnp.float32)}}
    with pytest.raises(InputError, match="starts from the values of q_proj, not only its shape"):
        init_adapters(jax.random.key(0), shapes, spec_of(name, target_modules=["q_proj"]))


@pytest.mark.parametrize("size", [(N, M), (M, N)])
def test_nystrom_is_exact_where_the_kernel_has_no_more_rank(size, x64):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(size[0], R)) @ rng.normal(size=(R, size[1])))
    leaves = start("nystrom", w)
    np.testing.assert_allclose(leaves["lora_a"] @ leaves["lora_n"] @ leaves["lora_b"], w, atol=1e-10)
    np.testing.assert_array_equal(leaves["lora_a"], w[:, :R])
    np.testing.assert_array_equal(leaves["lora_b"], w[:R])
    begun = {key: jnp.asarray(leaf) for key, leaf in leaves.items()}
    slora = PARAMETRIZATIONS["slora"].start(Keys(jax.random.key(0), jax.random.key(0)), w, begun, S)
    np.testing.assert_allclose(slora["frozen_a"] @ slora["frozen_b"], w, atol=1e-10)


def best(w, rank):
    """The best approximation of ``w`` of this rank."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[None, :rank] @ vt[:rank]


def test_the_first_step_of_lora_ga_is_the_best_of_twice_the_rank(x64):
    """The paper's theorem, with k = 1, as out = 256 gives; PEFT's port, with singular values in B, is far from it."""
    g = kernel(12, GAMMA**2, jnp.float64)
    leaves, eta = start("lora_ga", g), 1e-3
    a, b = leaves["lora_a"], leaves["lora_b"]
    np.testing.assert_allclose(a.T @ a, np.eye(R), atol=1e-12)
    np.testing.assert_allclose(b @ b.T, np.eye(R), atol=1e-12)

    def step(a, b):
        """To the first order in eta, of gradient descent on A and B where the kernel's gradient is G."""
        da, db = -eta * S * g @ b.T, -eta * S * a.T @ g
        return S * (a @ db + da @ b)

    np.testing.assert_allclose(step(a, b), -eta * S**2 * best(g, 2 * R), atol=1e-12)
    port = step(a, np.linalg.svd(g, compute_uv=False)[R : 2 * R, None] * b)
    assert np.abs(port + eta * S**2 * best(g, 2 * R)).max() > 1e-3


def test_lora_ga_has_the_authors_scale(x64):
    """``A = k V_r^T``, ``B = k U_{r:2r}``, ``k = m^(1/4) / sqrt(16)``, of their gradient (out, in)."""
    g = kernel(dtype=jnp.float64)
    u, _, vt = np.linalg.svd(np.asarray(g).T, full_matrices=False)
    k, leaves = M**0.25 / 4, start("lora_ga", g)
    np.testing.assert_allclose(leaves["lora_a"] @ leaves["lora_a"].T, k**2 * vt[:R].T @ vt[:R], atol=1e-12)
    own = u[:, R : 2 * R]
    np.testing.assert_allclose(leaves["lora_b"].T @ leaves["lora_b"], k**2 * own @ own.T, atol=1e-12)


def test_lora_sb_starts_one_step_further_and_projects_the_gradient(x64):
    update, g = kernel(dtype=jnp.float64), np.random.default_rng(8).normal(size=(N, M))
    leaves = start("lora_sb", update)
    a, b, r = (leaves[name] for name in ("lora_a", "lora_b", "lora_r"))
    np.testing.assert_allclose(S * a @ r @ b, best(update, R), atol=1e-12)
    np.testing.assert_allclose(r, np.diag(np.linalg.svd(update, compute_uv=False)[:R]) / S, atol=1e-12)
    np.testing.assert_allclose((a.T @ a, b @ b.T), np.stack([np.eye(R)] * 2), atol=1e-12)
    params, spec = {"q_proj": {"kernel": jnp.zeros((N, M))}}, spec_of("lora_sb", alpha=S * R, target_modules=["q_proj"])
    adapters = init_adapters(jax.random.key(0), params, spec, calibration={"q_proj": {"update": update}})

    def loss(r):
        own = {"q_proj": {**adapters["q_proj"], "lora_r": r}}
        return (merge(params, own, spec, safe=False)["q_proj"]["kernel"] * g).sum()  # whose gradient in W is g

    np.testing.assert_allclose(adapters["q_proj"]["lora_r"], r, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(adapters["q_proj"]["lora_r"]), S * a.T @ g @ b.T, atol=1e-5)


def test_loftq_is_the_best_correction_and_pefts(x64):
    """PEFT's decomposition has s = 1."""
    residual = kernel(dtype=jnp.float64)
    leaves = start("loftq", residual)
    np.testing.assert_allclose(S * leaves["lora_a"] @ leaves["lora_b"], best(residual, R), atol=1e-12)
    torch, utils = pytest.importorskip("torch"), pytest.importorskip("peft.utils.loftq_utils")
    theirs = utils._low_rank_decomposition(torch.tensor(np.asarray(residual).T), R)
    own = INITIALIZERS["loftq"](jax.random.key(0), residual, R, jnp.ones(()), jnp.float64)
    own = {name: np.asarray(leaf) for name, leaf in own.items()}
    sign = np.sign(np.sum(own["lora_a"] * theirs["R"].numpy().T, axis=0))
    np.testing.assert_allclose(own["lora_a"] * sign, theirs["R"].numpy().T, atol=1e-12)
    np.testing.assert_allclose(own["lora_b"] * sign[:, None], theirs["L"].numpy().T, atol=1e-12)


@pytest.mark.parametrize("size", [(N, M), (M, N)])
def test_cora_is_one_orthonormal_basis_for_all_layers(size, x64):
    """Of stacks and of modules whose names differ in a number alone, and not of others."""
    w = np.random.default_rng(2).normal(size=(4, *size))
    tree = {"block_1": {"fc": {"kernel": w[2]}}, "block_2": {"fc": {"kernel": w[3]}}, "head": {"fc": {"kernel": w[0]}}}
    tree = jax.tree.map(jnp.asarray, {**tree, "layers": {"fc": {"kernel": w[:3]}}})
    spec = LoraSpec(rank=R, init="cora", target_modules=["fc"])
    found = init_adapters(jax.random.key(0), tree, spec, dtype=jnp.float64)
    groups = {"layers": w[:3], "block_1": w[2:], "block_2": w[2:], "head": w[:1]}
    for name, kernels in groups.items():
        pair = found[name]["fc"]
        v = np.linalg.svd(kernels.reshape(-1, size[1]), full_matrices=False)[2][:R]
        own = pair["lora_b"].reshape(-1, R, size[1])
        for one in own:
            np.testing.assert_allclose(one.T @ one, v.T @ v, atol=1e-8)
            np.testing.assert_allclose(one @ one.T, np.eye(R), atol=1e-8)
            np.testing.assert_array_equal(one, own[0])
        assert not pair["lora_a"].any()


@pytest.mark.parametrize(
    "axes",
    [
        ("lora_ga", "adalora"),
        ("lora_ga", "lora_xs"),
        ("lora_sb", "lora"),
        ("lora_sb", "edora"),
        ("nystrom", "lora"),
        ("loftq", "adalora"),
    ],
)
def test_starts_that_mean_something_for_a_few_parametrisations_alone(axes):
    with pytest.raises(InputError, match=f"init='{axes[0]}' is for parametrization .*, not {axes[1]}: "):
        LoraSpec(init=axes[0], parametrization=axes[1])


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibration_that_is_missing_or_another_s_is_refused(name):
    params, spec = {"q_proj": {"kernel": kernel()}}, spec_of(name, target_modules=["q_proj"])
    how = "quantization_residual" if name == "loftq" else "calibrate"
    with pytest.raises(InputError, match=f"init='{name}' starts from data: pass calibration={how}"):
        init_adapters(jax.random.key(0), params, spec)
    for other in ({}, {"q_proj": {CALIBRATED[name]: kernel(M, N)}}, {"q_proj": {"other": kernel()}}):
        with pytest.raises(InputError, match=f"needs '{CALIBRATED[name]}' of shape .9, 8. at q_proj; the calibration"):
            init_adapters(jax.random.key(0), params, spec, calibration=other)
    with pytest.raises(InputError, match="init='kaiming' takes no calibration"):
        init_adapters(jax.random.key(0), params, LoraSpec(target_modules=["q_proj"]), calibration={})
