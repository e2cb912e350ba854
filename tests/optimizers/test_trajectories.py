"""Every member against an independent NumPy transcription of its published rule, in float64, within 1e-10."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import jit
from tests.optimizers import oracles
from tests.optimizers.members import MEMBERS, pair_of, rule_options

STEPS, SCALE = 40, 2.0
SHAPES = [(9, 6, 3), (9, 6, 3), (5, 8, 2)]  # in, out, rank: two pairs of one shape, one of another


def starts(zero_b):
    rng = np.random.default_rng(3)
    return [(rng.normal(size=(r, n)), rng.normal(size=(m, r)) * (not zero_b)) for n, m, r in SHAPES]


def full_gradient(i):
    """G (out, in) of a quadratic with a rotating target and noise: (a, b, t) -> G."""
    n, m, _ = SHAPES[i]
    rng = np.random.default_rng(50 + i)
    target, noise = rng.normal(size=(m, n)), rng.normal(size=(STEPS, m, n))
    return lambda a, b, t: 0.3 * (SCALE * b @ a - target) + 0.1 * noise[t]


def rate_at(count):
    return 5e-2 * (0.6 + 0.4 * jnp.cos(jnp.asarray(count, jnp.float64) / 9))


@functools.cache
def compiled(name):
    """``(init, update)`` of a member, compiled once for both decays: the last argument of each."""
    made = lambda decay: MEMBERS[name].make(rate_at, SCALE, weight_decay=lambda count: decay)
    init = jit(lambda params, decay: made(decay).init(params))
    return init, jit(lambda grads, state, params, decay: made(decay).update(grads, state, params))


def ours(name, zero_b, decay):
    """Our trajectory: a list over steps of [(a, b)] in the sheet's orientation."""
    pairs = starts(zero_b)
    params = {f"m{i}": {"proj": pair_of(a, b)} for i, (a, b) in enumerate(pairs)}
    init, update = compiled(name)
    state, history = init(params, decay), []
    for t in range(STEPS):
        grads = {}
        for i, (a, b) in enumerate(pairs):
            g = full_gradient(i)(a, b, t)
            grads[f"m{i}"] = {"proj": pair_of(SCALE * b.T @ g, SCALE * g @ a.T)}
        updates, state = update(grads, state, params, decay)
        params = optax.apply_updates(params, updates)
        pairs = [
            tuple(np.asarray(params[f"m{i}"]["proj"][k]).T for k in ("lora_a", "lora_b")) for i in range(len(pairs))
        ]
        history.append(pairs)
    return history


def theirs(member, zero_b, more):
    rates = [float(rate_at(t)) for t in range(STEPS)]
    options = rule_options(member) | more
    pairs = starts(zero_b)
    if member.rule == "lora_rite":
        gradient = lambda pairs, t: [full_gradient(i)(a, b, t) for i, (a, b) in enumerate(pairs)]
        return oracles.lora_rite(pairs, gradient, rates, SCALE, **options)
    if member.rule == "oplora":
        options["gradient_form"] = "tangent"
    apart = []
    for i, (a, b) in enumerate(pairs):
        if member.rule == "lora_pre":
            options["mb0"] = random_start(a, b)
        if member.rule == "stiefel_lora":
            options["q0"] = np.linalg.qr(a.T[np.arange(b.shape[0]) % a.shape[1]])
            options["q0"] = options["q0"][0] * np.sign(np.diag(options["q0"][1]))
        apart.append(getattr(oracles, member.rule)(a, b, full_gradient(i), rates, SCALE, **options))
    return list(zip(*apart, strict=True))


def random_start(a, b):
    """The start of LoRA-Pre's moments, read from the state it makes."""
    state = MEMBERS["lora_pre"].make(1e-2).init({"p": pair_of(a, b)})
    moments = jax.tree.leaves(state, is_leaf=lambda x: type(x).__name__ == "LoraPreState")
    found = next(x for x in moments if type(x).__name__ == "LoraPreState")
    return {k: {"m": np.asarray(getattr(found.mu, k).b), "v": np.asarray(getattr(found.nu, k).b)} for k in "ab"}


@pytest.mark.parametrize("zero_b,decay", [(True, 0.1), (False, 0.0)])
@pytest.mark.parametrize("name", MEMBERS)
def test_equals_the_transcription(x64, name, zero_b, decay):
    member, tol = MEMBERS[name], MEMBERS[name].tolerance
    if member.rule == "stiefel_lora" and not zero_b:
        pytest.skip("the first update of a trained pair keeps its function: tested by itself")
    mine = ours(name, zero_b, decay)
    for t, (pairs, expected) in enumerate(zip(mine, theirs(member, zero_b, {"weight_decay": decay}), strict=True)):
        for (a, b), (a_there, b_there) in zip(pairs, expected, strict=True):
            np.testing.assert_allclose(a, a_there, rtol=tol, atol=tol, err_msg=f"A after step {t + 1}")
            np.testing.assert_allclose(b, b_there, rtol=tol, atol=tol, err_msg=f"B after step {t + 1}")
