"""Polar factors and singular vectors by eigh, LoRA-Muon's step and BaLoRA's balance, LoFT at full rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, optimizers
from stablelora_jax.optimizers import linalg
from tests.helpers import jit
from tests.optimizers import oracles

RNG = np.random.default_rng(31)


def start(n=8, m=6, r=3, dtype=None):
    a, b = RNG.normal(size=(n, r)), RNG.normal(size=(r, m))
    return {"p": {"lora_a": jnp.asarray(a, dtype), "lora_b": jnp.asarray(b, dtype)}}


def after(tx, params, grads):
    """The factors, (n, r) and (r, m), after one update."""
    updates, _ = jit(lambda: tx.update(grads, tx.init(params), params))()
    return (np.asarray(x) for x in optax.apply_updates(params, updates)["p"].values())


def test_polar_factors_of_any_size_and_rank():
    x = RNG.normal(size=(12, 5)) * [1, 1, 1, 1e-3, 1]
    low = x[:, :2] @ RNG.normal(size=(2, 5))  # of rank 2
    given = np.stack([x, 1e-30 * x, 1e25 * x, low, 0 * x])
    (found,) = jit(lambda x: linalg.polar([x]))(jnp.asarray(given, jnp.float32))
    for same in found[:3]:
        np.testing.assert_allclose(same, oracles.msign(x), atol=1e-3)
    values = np.linalg.svd(found[3:], compute_uv=False)
    np.testing.assert_allclose(values, [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], atol=1e-4)


def test_singular_values_and_vectors(x64):
    x = RNG.normal(size=(3, 4, 4))
    (found,) = linalg.svd([jnp.asarray(x)])
    np.testing.assert_allclose(found.values, np.linalg.svd(x, compute_uv=False), atol=1e-13)
    rebuilt = (found.left * found.values[:, None]) @ jnp.swapaxes(found.right, -1, -2)
    np.testing.assert_allclose(rebuilt, x, atol=1e-13)
    for side in (found.left, found.right):
        np.testing.assert_allclose(linalg.gram(side), np.broadcast_to(np.eye(4), x.shape), atol=1e-12)


def test_lora_muon_moves_the_kernel_by_two_spectral_halves(x64):
    """s (dA B^T + A dB^T) = -eta / 2 (msign(G QB) QB^T + QA msign(QA^T G)), whatever the gradient's size."""
    params, g, rate, s = start(), RNG.normal(size=(8, 6)), 1e-3, 4.0
    a, b = (np.asarray(x) for x in params["p"].values())
    qa, qb = np.linalg.qr(a)[0], np.linalg.qr(b.T)[0]
    wanted = -rate / 2 * (oracles.msign(g @ qb) @ qb.T + qa @ oracles.msign(qa.T @ g))
    for size in (1e-6, 1.0):
        grads = {"p": {"lora_a": s * size * g @ b.T, "lora_b": s * size * a.T @ g}}
        new_a, new_b = after(optimizers.lora_muon(rate, damping=0.0, scale=s), params, grads)
        np.testing.assert_allclose(s * ((new_a - a) @ b + a @ (new_b - b)), wanted, atol=1e-14)
    assert np.linalg.norm(wanted, 2) <= rate


def test_lora_muon_decays_the_product_and_not_the_step(x64):
    params = start()
    a, b = (np.asarray(x) for x in params["p"].values())
    grads = {"p": {"lora_a": RNG.normal(size=(8, 3)), "lora_b": RNG.normal(size=(3, 6))}}
    plain_a, plain_b = after(optimizers.lora_muon(0.1), params, grads)
    new_a, new_b = after(optimizers.lora_muon(0.1, weight_decay=3.0), params, grads)
    da, db = plain_a - a, plain_b - b
    np.testing.assert_allclose(new_a @ new_b, 0.7 * a @ b + da @ b + a @ db + da @ db / 0.7, atol=1e-12)


@pytest.mark.parametrize("dtype,atol", [(jnp.float64, 1e-12), (jnp.float32, 1e-5)])
def test_balora_balances_what_the_inner_optimizer_made(x64, dtype, atol):
    params = start(dtype=dtype)
    grads = {"p": {"lora_a": jnp.ones((8, 3), dtype), "lora_b": -jnp.ones((3, 6), dtype)}}
    a, b = after(optax.sgd(0.1), params, grads)
    new_a, new_b = after(optimizers.balance_after(optax.sgd(0.1)), params, grads)
    np.testing.assert_allclose(new_a @ new_b, a @ b, atol=atol)
    for found in (new_a.T @ new_a, new_b @ new_b.T):
        np.testing.assert_allclose(found, np.diag(np.linalg.svd(a @ b, compute_uv=False)[:3]), atol=atol)
    assert ((new_a * a).sum(0) > 0).all()


def test_balora_leaves_a_product_of_lower_rank_as_it_is(x64):
    """A zero B, as after a first step at rate zero, or a missing direction: both its columns would be zero for good."""
    a, b = start()["p"].values()
    low = {"p": {"lora_a": jnp.stack([a, a]), "lora_b": jnp.stack([0 * b, b.at[2].set(b[0])])}}
    new_a, new_b = after(optimizers.balora(1e-2), low, jax.tree.map(jnp.zeros_like, low))
    np.testing.assert_array_equal(new_a, low["p"]["lora_a"])
    np.testing.assert_array_equal(new_b, low["p"]["lora_b"])


def test_balora_refuses_what_is_no_interval_and_no_optimizer():
    for every in (0, 1.5, True, None):
        with pytest.raises(InputError, match="every must be a whole number"):
            optimizers.balora(1e-3, every=every)
    with pytest.raises(InputError, match="inner must be an optax"):
        optimizers.balance_after(1e-3)


def test_loft_of_full_rank_is_adamw_of_the_kernel(x64):
    n, s = 4, 2.0
    params, target = start(n, n, n), jnp.asarray(RNG.normal(size=(n, n)))
    options = dict(b2=0.9, eps=1e-3, weight_decay=0.1)
    loss = lambda w: jnp.sum(jnp.sin(w - target))
    product = lambda p: s * p["p"]["lora_a"] @ p["p"]["lora_b"]

    def train(tx, make_w, start):
        def step(carry, _):
            now, state = carry
            updates, state = tx.update(jax.grad(lambda x: loss(make_w(x)))(now), state, now)
            now = optax.apply_updates(now, updates)
            return (now, state), make_w(now)

        return jit(lambda: jax.lax.scan(step, (start, tx.init(start)), None, 12)[1])()

    seen = train(optimizers.loft(1e-2, lam=0.0, scale=s, **options), product, params)
    np.testing.assert_allclose(seen, train(optax.adamw(1e-2, **options), lambda w: w, product(params)), atol=1e-10)
