"""Which changes of factorisation (A, B) -> (A R, B R^-T) leave the trajectory of A B^T alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import jit
from tests.optimizers.members import GENERAL, MEMBERS, NONE, ORTHOGONAL, PERMUTATION, SIGN, Member, adam, nothing

STEPS, N, M, R = 40, 8, 6, 3
RNG = np.random.default_rng(11)
MATRICES = {
    SIGN: np.diag([1.0, -1.0, -1.0]),
    PERMUTATION: np.diag([1.0, -1.0, 1.0])[[2, 0, 1]],
    ORTHOGONAL: np.linalg.qr(RNG.normal(size=(R, R)))[0],
}
MATRICES[GENERAL] = MATRICES[ORTHOGONAL] @ np.diag([3.0, 1.0, 1.5]) @ np.linalg.qr(RNG.normal(size=(R, R)))[0]
PLAIN = {
    "sgd": Member(lambda rate, weight_decay=0.0: optax.sgd(rate), "", ORTHOGONAL, nothing),
    "adam": Member(lambda rate, weight_decay=0.0: optax.adamw(rate, weight_decay=weight_decay), "", PERMUTATION, adam),
}


def product_after(step, factor, zero_b):
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(N, R)), rng.normal(size=(M, R)) * (0.0 if zero_b else 0.7)
    params = {"p": {"lora_a": jnp.asarray(a @ factor), "lora_b": jnp.asarray((b @ np.linalg.inv(factor).T).T)}}
    return np.asarray(step(params))


def deviations(member, decay):
    """Relative deviation of A B^T for each kind of change."""
    tx, target = member.make(2e-2, weight_decay=decay), jnp.asarray(np.random.default_rng(6).normal(size=(N, M)))
    loss = lambda p: 0.5 * jnp.sum((p["p"]["lora_a"] @ p["p"]["lora_b"] - target) ** 2) / 5

    @jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, STEPS)
        return params["p"]["lora_a"] @ params["p"]["lora_b"]

    zero_b = member.first_move  # a first update that orthonormalises B: the start that it is made for
    plain = product_after(train, np.eye(R), zero_b)
    changed = {kind: product_after(train, factor, zero_b) for kind, factor in MATRICES.items()}
    return {kind: np.abs(w - plain).max() / np.abs(plain).max() for kind, w in changed.items()}


@pytest.mark.parametrize("name", [*PLAIN, *MEMBERS])
def test_respects_exactly_the_stated_changes(x64, name):
    member = (PLAIN | MEMBERS)[name]
    found = deviations(member, decay=0.05 if member.symmetry == GENERAL else 0.0)
    for kind, deviation in found.items():
        assert kind > NONE
        if kind <= member.symmetry:
            assert deviation < (1e-10 if member.tolerance <= 1e-10 else 1e-6), (kind, deviation)
        else:
            assert deviation > 1e-3, (kind, deviation)
