"""Forward mode through an adapted model: ``jax.jvp``, ``jax.jacfwd``, products with the Hessian."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import Batch, LoraSpec, adapted, init_adapters, summed_loss
from tests.helpers import random_params, tiny_decoder, trained


class Mixed(nn.Module):
    """An embedding, a convolution, an einsum, products of one and of more axes."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 6, name="embed")(tokens)
        x = jnp.tanh(nn.Conv(6, (2,), name="conv")(x))
        x = nn.DenseGeneral((2, 3), name="split")(x)
        x = jnp.sin(nn.DenseGeneral(5, axis=(-2, -1), name="join")(x))
        x = nn.Einsum((5, 4), "btd,df->btf", use_bias=False, name="einsum")(x)
        return nn.Dense(3, name="out")(x)


def loss_of(spec):
    tokens = jnp.arange(8).reshape(2, 4) % 7
    params = random_params(Mixed(), tokens)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    apply = adapted(Mixed(), spec).apply
    return lambda adapters: jnp.square(jnp.sin(apply({"params": params, "lora": adapters}, tokens))).sum(), adapters


def close(trees, others, **tolerance):
    for one, other in zip(jax.tree.leaves(trees), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


def dot(one, other):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, one, other)))


@pytest.mark.parametrize("options", [{"target_modules": ["embed", "join"]}, {"parametrization": "dora"}])
def test_forward_mode_is_reverse_mode(options):
    loss, adapters = loss_of(LoraSpec(**{"target_modules": "all-linear", "rank": 2, **options}))
    vector = jax.tree.map(jnp.cos, adapters)
    along, slope = jax.jit(lambda a: (jax.jvp(loss, (a,), (vector,))[1], dot(jax.grad(loss)(a), vector)))(adapters)
    np.testing.assert_allclose(along, slope, rtol=1e-4)


def test_products_with_the_hessian():
    """Forward over reverse, reverse over forward and reverse over reverse."""
    loss, adapters = loss_of(LoraSpec(target_modules="all-linear", rank=2))
    vector = jax.tree.map(jnp.cos, adapters)

    @jax.jit
    def products(a):
        forward = jax.jvp(jax.grad(loss), (a,), (vector,))[1]
        over_forward = jax.grad(lambda a: jax.jvp(loss, (a,), (vector,))[1])(a)
        return forward, over_forward, jax.grad(lambda a: dot(jax.grad(loss)(a), vector))(a)

    forward, over_forward, wanted = products(adapters)
    close(forward, wanted, rtol=1e-3, atol=1e-4)
    close(over_forward, wanted, rtol=1e-3, atol=1e-4)


def decoder(attention):
    model, params = tiny_decoder(num_hidden_layers=1)
    spec = LoraSpec(target_modules=["q_proj", "down_proj"], rank=2)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    tokens = jnp.arange(32).reshape(2, 16) % 31
    return adapted(model.clone(attention=attention), spec), params, adapters, tokens


def test_a_tangent_through_the_decoder():
    model, params, adapters, tokens = decoder("xla")
    loss = lambda a: jnp.square(model.apply({"params": params, "lora": a}, tokens)).mean()
    vector = jax.tree.map(jnp.cos, adapters)
    along, slope = jax.jit(lambda a: (jax.jvp(loss, (a,), (vector,))[1], dot(jax.grad(loss)(a), vector)))(adapters)
    np.testing.assert_allclose(along, slope, rtol=1e-4)


def test_a_product_with_the_hessian_of_the_training_loss():
    """With attention in blocks and the head in chunks, which have reverse mode only: forward over reverse is there."""
    found = []
    for attention in ("blockwise", "xla"):
        model, params, adapters, tokens = decoder(attention)
        ones = jnp.ones_like(tokens)
        batch = Batch(tokens, ones, ones, jnp.broadcast_to(jnp.arange(16), tokens.shape))
        loss = lambda a: summed_loss(model, {"params": params, "lora": a}, batch)  # noqa: B023
        found.append(jax.jit(lambda a: jax.jvp(jax.grad(loss), (a,), (jax.tree.map(jnp.cos, a),))[1])(adapters))  # noqa: B023
    close(*found, rtol=1e-3, atol=1e-3)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[0])) > 1e-2
