"""What the papers prove or claim of their own rules, and the exact identities between members."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, optimizers
from stablelora_jax.optimizers import linalg as gram
from stablelora_jax.optimizers.allora import scale_rows_by_norm
from stablelora_jax.optimizers.lora_pre import LoraPreState
from tests.helpers import jit
from tests.optimizers import oracles

RNG = np.random.default_rng(21)
TINY = 1e-60  # as good as no eps, and 0 / 0 is not met at B = 0


def start(n=8, m=6, r=3, zero_b=False, dtype=None):
    b = np.zeros((r, m)) if zero_b else RNG.normal(size=(r, m))
    return {"p": {"lora_a": jnp.asarray(RNG.normal(size=(n, r)), dtype), "lora_b": jnp.asarray(b, dtype)}}


def train(tx, params, scale, steps=60, weight=1.0):
    """Follow a quadratic in s A B; gives the products s A B after each step."""
    n, m = params["p"]["lora_a"].shape[0], params["p"]["lora_b"].shape[1]
    target = jnp.asarray(np.random.default_rng(1).normal(size=(n, m)), params["p"]["lora_a"].dtype)
    loss = lambda p: weight * jnp.sum((scale * p["p"]["lora_a"] @ p["p"]["lora_b"] - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), scale * params["p"]["lora_a"] @ params["p"]["lora_b"]

    return jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, steps)[1])(params)


def test_lora_plus_is_adam_with_another_scale(x64):
    params = start(zero_b=True)
    plus = train(optimizers.lora_plus(1e-2, ratio=16.0, eps=TINY), params, 2.0)
    adam = train(optax.adam(1e-2, eps=TINY), params, 32.0)
    chex.assert_trees_all_close(plus, adam, rtol=1e-12, atol=1e-14)
    decayed = train(optimizers.lora_plus(1e-2, ratio=16.0, eps=TINY, weight_decay=0.1), params, 2.0)
    adamw = train(optax.adamw(1e-2, eps=TINY, weight_decay=0.1), params, 32.0)
    assert np.abs(decayed - adamw).max() > 1e-4  # decay differs between the factors


@pytest.mark.parametrize("c", [0.25, 8.0])
def test_a_smaller_a_is_a_larger_rate(x64, c):
    """(A0, etaA, s) and (c A0, c etaA, s / c) give the same s A B."""
    params = start(zero_b=True)
    scaled = {"p": {**params["p"], "lora_a": c * params["p"]["lora_a"]}}
    rates = lambda a: optax.partition(
        {"a": optax.adam(a, eps=TINY), "b": optax.adam(1e-2, eps=TINY)},
        lambda p: {"p": {"lora_a": "a", "lora_b": "b"}},
    )
    plain, other = train(rates(1e-2), params, 2.0), train(rates(c * 1e-2), scaled, 2.0 / c)
    chex.assert_trees_all_close(plain, other, rtol=1e-12, atol=1e-13)
    shrink = lambda tx: optimizers.shrink_until_stable(tx, 5e-2)
    stopped, unlike = train(shrink(rates(1e-2)), params, 2.0), train(shrink(rates(c * 1e-2)), scaled, 2.0 / c)
    assert np.abs(stopped - unlike).max() > 1e-4  # the stop rule sees ||A|| / ||B||


@pytest.mark.parametrize("c", [0.5, 4.0])
def test_with_a_frozen_the_scale_is_a_rate(x64, c):
    params = start(zero_b=True)
    adam = lambda rate, s: train(optimizers.lora_fa(rate, eps=TINY), params, s)
    chex.assert_trees_all_close(adam(1e-2, 2.0), adam(1e-2 / c, 2.0 * c), rtol=1e-12, atol=1e-13)
    sgd = lambda rate: optax.chain(
        optax.sgd(rate), optax.masked(optax.set_to_zero(), {"p": {"lora_a": 1, "lora_b": 0}})
    )
    plain, other = train(sgd(1e-3), params, 2.0), train(sgd(1e-3 / c**2), params, 2.0 * c)
    chex.assert_trees_all_close(plain, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("jitted", [False, True])
def test_lora_plus_of_ratio_one_is_adamw_to_the_last_bit(jitted):
    params, wrap = start(dtype=jnp.float32), jax.jit if jitted else (lambda f: f)
    ours, theirs = optimizers.lora_plus(1e-2, ratio=1.0, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)
    states = ours.init(params), theirs.init(params)
    updates = wrap(ours.update), wrap(theirs.update)
    for _ in range(3):
        u, s = updates[0](params, states[0], params)
        v, t = updates[1](params, states[1], params)
        chex.assert_trees_all_equal(u, v)
        states, params = (s, t), optax.apply_updates(params, u)


def kernel_gradient(params):
    """G (in, out) of a quadratic, and its factor gradients at scale s."""
    a, b = params["p"]["lora_a"], params["p"]["lora_b"]
    g = jnp.asarray(RNG.normal(size=(a.shape[0], b.shape[1])))
    return g, lambda s: {"p": {"lora_a": s * g @ b.T, "lora_b": s * a.T @ g}}


def projections(params):
    a, b = np.asarray(params["p"]["lora_a"]), np.asarray(params["p"]["lora_b"])
    return a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b


@pytest.mark.parametrize("zero_b", [False, True])
@pytest.mark.parametrize("projection", ["sylvester", "zero", "symmetric"])
def test_lora_pro_steps_along_the_projected_gradient(x64, projection, zero_b):
    params, s = start(zero_b=zero_b), 2.0
    g, factors = kernel_gradient(params)
    tx = optimizers.scale_by_lora_pro(projection, damping=0.0, scale=s)
    h, _ = jit(tx.update)(factors(s), tx.init(params), params)
    (a, b), (ha, hb) = params["p"].values(), h["p"].values()
    pa, pb = projections(params)
    equivalent = s * ha @ b + s * a @ hb
    np.testing.assert_allclose(equivalent, g - (np.eye(8) - pa) @ g @ (np.eye(6) - pb), atol=1e-12)
    descent = sum(float((factors(s)["p"][k] * h["p"][k]).sum()) for k in h["p"])
    np.testing.assert_allclose(descent, float((equivalent**2).sum()), rtol=1e-10)
    if projection == "sylvester" and not zero_b:  # nearest to the factors' own gradients, so stationary in X
        x = np.asarray(np.linalg.pinv(a) @ (ha - factors(s)["p"]["lora_a"] @ np.linalg.inv(b @ b.T) / s**2)).T
        right = -np.linalg.inv(b @ b.T) @ (factors(s)["p"]["lora_a"].T @ a) / s**2
        np.testing.assert_allclose(b @ b.T @ x + x @ a.T @ a, right, atol=1e-10)


def test_lora_pro_refuses_a_projection_that_it_does_not_know():
    for make in (optimizers.scale_by_lora_pro, lambda name: optimizers.lora_pro(1e-3, projection=name)):
        with pytest.raises(InputError, match="projection must be one of sylvester, zero, symmetric, not 'left'"):
            make("left")


@pytest.mark.parametrize("factor", ["a", "b"])
def test_altlora_projects_the_gradient_on_one_factor(x64, factor):
    params, s, rate = start(), 2.0, 0.1
    g, factors = kernel_gradient(params)
    tx = optimizers.altlora(rate, b1=0.0, lam=0.0, first=factor, scale=s)
    u, _ = jit(tx.update)(factors(s), tx.init(params), params)
    (a, b), (da, db) = params["p"].values(), u["p"].values()
    pa, pb = projections(params)
    np.testing.assert_allclose(s * (da @ b + a @ db), -rate * (g @ pb if factor == "a" else pa @ g), atol=1e-12)
    assert not (db if factor == "a" else da).any()


def test_scaled_gd_is_gd_where_factors_are_orthonormal(x64):
    q = lambda n: np.linalg.qr(RNG.normal(size=(n, 3)))[0]
    params = {"p": {"lora_a": jnp.asarray(q(8)), "lora_b": jnp.asarray(q(6).T)}}
    tx = optimizers.scale_by_riemannian(0.0)
    updates, _ = jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_close(updates, params, atol=1e-13)
    far = optimizers.scale_by_riemannian(1e8)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: 1e8 * x, far.update(params, far.init(params), params)[0]), params
    )


def test_lora_fa_of_peft_is_the_gradient_where_a_is_orthonormal(x64):
    params = {"p": {"lora_a": jnp.asarray(np.linalg.qr(RNG.normal(size=(8, 3)))[0]), "lora_b": jnp.zeros((3, 6))}}
    grads = {"p": {"lora_a": params["p"]["lora_a"], "lora_b": jnp.asarray(RNG.normal(size=(3, 6)))}}
    tx = optimizers.lora_fa(1e-2, variant="peft", eps=0.0)
    updates, state = jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["p"]["lora_b"], -1e-2 * np.sign(grads["p"]["lora_b"]), rtol=1e-6)
    assert not updates["p"]["lora_a"].any()


@pytest.mark.parametrize("rounds,worst", [(1, 1.01), (2, 1 + 1e-4), (5, 1 + 1e-9)])
def test_oplora_comes_to_the_truncated_svd(x64, rounds, worst):
    params, s, rate = start(14, 20, 3), 2.0, 0.1
    g, factors = kernel_gradient(params)
    target = np.asarray(s * params["p"]["lora_a"] @ params["p"]["lora_b"] - rate * g)
    best = np.linalg.norm(target - oracles.svd_truncate(target, 3))
    tx = optimizers.oplora(rate, rounds=rounds, momentum=None, lam=0.0, gradient="full", scale=s)
    updates, _ = jit(tx.update)(factors(s), tx.init(params), params, kernel_grads={"p": {"kernel": g}})
    new = optax.apply_updates(params, updates)["p"]
    assert np.linalg.norm(target - s * new["lora_a"] @ new["lora_b"]) <= worst * best
    plain = np.linalg.norm(
        target - s * (params["p"]["lora_a"] - rate * s * g @ params["p"]["lora_b"].T) @ params["p"]["lora_b"]
    )
    assert plain > 1.05 * best


def test_oplora_wants_the_gradient_it_was_made_for():
    params = start(dtype=jnp.float32)
    full, tangent = optimizers.oplora(1e-2, gradient="full"), optimizers.oplora(1e-2)
    with pytest.raises(InputError, match="kernel_grads"):
        full.update(params, full.init(params), params)
    with pytest.raises(InputError, match="kernel_grads"):
        tangent.update(params, tangent.init(params), params, kernel_grads={})
    with pytest.raises(InputError, match="p has no entry in kernel_grads"):
        full.update(params, full.init(params), params, kernel_grads={"q": jnp.ones((8, 6))})


@pytest.mark.parametrize("zero_b", [True, False])
def test_stiefel_keeps_b_orthonormal_and_its_first_update_the_function(zero_b):
    params = start(40, 30, 8, zero_b, jnp.float32)
    tx = optimizers.stiefel_lora(1e-2, stiefel_learning_rate=0.3)
    updates, state = jit(tx.update)(params, tx.init(params), params)
    first = optax.apply_updates(params, updates)
    b = first["p"]["lora_b"]
    np.testing.assert_allclose(b @ b.T, np.eye(8), atol=1e-6)
    product = lambda p: p["p"]["lora_a"] @ p["p"]["lora_b"]
    np.testing.assert_allclose(product(first), product(params), atol=2e-5)
    if zero_b:
        assert not first["p"]["lora_a"].any()
    update = jax.jit(tx.update)
    rng = np.random.default_rng(2)
    for _ in range(500):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
        updates, state = update(grads, state, first)
        first = optax.apply_updates(first, updates)
    b = np.asarray(first["p"]["lora_b"], np.float64)
    assert np.abs(b @ b.T - np.eye(8)).max() < 1e-6


@pytest.mark.parametrize("n,m,r", [(2, 9, 4), (1, 5, 3), (3, 4, 4)])
def test_stiefel_completes_the_basis_where_a_has_too_few_rows(n, m, r):
    params = start(n, m, r, True, jnp.float32)
    tx = optimizers.stiefel_lora(1e-2)
    updates, _ = jit(tx.update)(params, tx.init(params), params)
    b = updates["p"]["lora_b"]
    np.testing.assert_allclose(b @ b.T, np.eye(r), atol=1e-6)


@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 1e-4])
def test_rite_in_float32_sees_directions_of_condition_ten_thousand(smallest):
    """What B has little of, A must move the more."""
    q = lambda k: np.linalg.qr(RNG.normal(size=(k, 4)))[0]
    mix = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    b = ((q(50) * [1, 0.1, 0.01, smallest]) @ mix).T
    params = {"p": {"lora_a": jnp.asarray(q(40), jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}}
    g = RNG.normal(size=(40, 50))
    grads = {"p": {"lora_a": jnp.asarray(g @ b.T, jnp.float32), "lora_b": jnp.asarray(q(40).T @ g, jnp.float32)}}
    tx = optimizers.lora_rite(1e-3)
    updates, _ = jit(tx.update)(grads, tx.init(params), params)
    moved = np.asarray(updates["p"]["lora_a"], np.float64) @ np.linalg.svd(b)[0]
    expected = 1e-3 / np.linalg.svd(b, compute_uv=False)  # u (u^T u)^-1/2 is orthonormal, times 1 / sigma
    np.testing.assert_allclose(np.linalg.norm(moved, axis=0), expected, rtol=2e-2)


def test_stiefel_refuses_fewer_outputs_than_ranks():
    with pytest.raises(InputError, match="p: 2 outputs cannot have 3 orthonormal"):
        optimizers.stiefel_lora(1e-2).init(start(5, 2, 3))


def test_lora_pre_holds_a_constant_low_rank_gradient_as_it_is(x64):
    params = start(9, 7, 3)
    grads = jax.tree.map(lambda x: jnp.outer(x[:, 0], x[0]), params)  # rank 1
    tx = optimizers.lora_pre(1e-2, rank=1)
    state = tx.init(params)
    step = jit(tx.update)
    for _ in range(400):
        _, state = step(grads, state, params)
    wanted = lambda x: isinstance(x, LoraPreState)
    moment = next(filter(wanted, jax.tree.leaves(state, is_leaf=wanted))).mu.a
    np.testing.assert_allclose(moment.b @ moment.a, grads["p"]["lora_a"], atol=1e-6)


def test_allora_multiplies_rows_of_b_by_their_norm():
    params, eta = start(dtype=jnp.float32), 2.0
    c = 1 / np.sqrt(np.linalg.norm(params["p"]["lora_b"], axis=0) + 1 / eta**2)
    assert (c > 0).all() and (c <= eta).all()
    tx = optax.chain(scale_rows_by_norm(eta), optax.sgd(1.0))
    updates, _ = jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["p"]["lora_b"], -c[None] * params["p"]["lora_b"], rtol=1e-5)
    np.testing.assert_array_equal(updates["p"]["lora_a"], -params["p"]["lora_a"])


def test_freezing_a_saves_its_gradient_and_the_inputs_that_it_needs():
    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.Dense(64, name=f"fc_{i}")(x)
            return x

    model, spec, x = Tower(), LoraSpec(target_modules=["fc_0", "fc_1", "fc_2"], rank=2), jnp.ones((32, 64))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01), params)
    adapters, lora = init_adapters(jax.random.key(0), params, spec), adapted(model, spec)
    adapters = jax.tree.map(lambda leaf: leaf + 0.01, adapters)

    def loss(adapters, params, x, view):
        return lora.apply({"params": params, "lora": view(adapters)}, x).sum()

    def compiled(view):
        step = jax.jit(jax.grad(lambda *given: loss(*given, view)))
        return step.lower(adapters, params, x).compile().cost_analysis()["flops"], step(adapters, params, x)

    (flops, grads), (more, full) = compiled(optimizers.freeze_a), compiled(lambda adapters: adapters)
    assert more - flops >= 3 * 2 * 32 * 64 * 2  # x^T (dy B^T) of each module
    for name in grads:
        assert not grads[name]["lora_a"].any() and full[name]["lora_a"].any()
        np.testing.assert_allclose(grads[name]["lora_b"], full[name]["lora_b"], rtol=1e-5)

    def saved(view):
        """How many inputs of modules wait for the backward pass."""
        _, backward = jax.vjp(lambda a: loss(a, params, x, view), adapters)
        return sum(leaf.shape == (32, 64) for leaf in jax.tree.leaves(backward))

    assert saved(optimizers.freeze_a) == 0 and saved(lambda adapters: adapters) == 3


bases_of = jit(lambda x: gram.orthonormal([x]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(0, 5), power=st.integers(-6, 3))
def test_orthonormal_bases_of_any_rank(seed, rank, power):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 12, rank)) @ rng.normal(size=(2, rank, 5)) * 10.0**power
    ((q, t),) = bases_of(jnp.asarray(x, jnp.float32))
    found = np.asarray(jnp.swapaxes(q, -1, -2) @ q, np.float64)
    values = np.linalg.eigvalsh(found)
    assert np.minimum(np.abs(values), np.abs(values - 1)).max() < 1e-4  # a projection
    np.testing.assert_allclose(np.asarray(jnp.asarray(x, jnp.float32) @ t), q, atol=1e-3)
    assert (np.round(values.sum(-1)) <= rank).all()


def test_a_step_in_half_precision_matmuls_is_never_asked_for():
    """The r x r algebra asks for float32 products on every backend."""
    params = start(dtype=jnp.float32)
    for tx in (
        optimizers.lora_rite(1e-2),
        optimizers.lora_pro(1e-2),
        optimizers.oplora(1e-2),
        optimizers.scaled_gd(1e-2),
    ):
        text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert dots and all("HIGHEST" in line for line in dots)
