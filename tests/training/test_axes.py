"""The axes multiply: every parametrisation with every initialisation and optimizer trains, by one and the same code.

The rows that cover every member train a small net in the default tier and the embedded base in the long one, which has
the full product on the net, too; the full product on the embedded base is soak.
"""

import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, base_directory, init_adapters, load_pretrained, optimizers
from stablelora_jax.data import Example, make_batch
from stablelora_jax.lora.initializers import INITIALIZERS
from stablelora_jax.lora.leaves import is_frozen, split_frozen, trains_pairs, with_frozen
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.training.loss import summed_loss
from stablelora_jax.training.step import init_state, updated
from stablelora_jax.utils import tree
from tests.helpers import jit, long, random_calibration, random_params, soak

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "stable_lora": lambda: optimizers.stable_lora(1e-2, shrink_ratio=5e-3),
    "lora_rite": lambda: optimizers.lora_rite(1e-2),
}
STEPS = 20


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(12, name="mid")(x)), None


class Net(nn.Module):
    """A wide kernel, two square ones in a stack, and a tall one."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="layers")(nn.tanh(nn.Dense(12, name="up")(x)), None)
        return nn.Dense(8, name="down")(x)


class Problem(NamedTuple):
    """A model, its parameters, and a loss of ``(lora, variables)``."""

    model: Any
    params: Any
    loss: Any


class Chosen(NamedTuple):
    """What is adapted: where nothing else is said, where a parametrisation cannot take all, and its options."""

    targets: list[str]
    others: dict[str, list[str]]
    options: dict[str, dict[str, int]]


CHOSEN = {
    "net": Chosen(
        ["up", "down"],
        {"lorta": ["mid"], "reslora": ["mid"]},
        {
            "vblora": {"vectors": 16, "length": 4},
            "miss_mini": {"mini_r": 4},
            "unilora": {"length": 64},
            "lorta": {"heads": 3},
        },
    ),
    "base": Chosen(
        ["q_proj", "down_proj"],
        {"lorta": ["q_proj", "o_proj"]},
        {
            "vblora": {"vectors": 16, "length": 32},
            "miss_mini": {"mini_r": 4},
            "unilora": {"length": 512},
            "lorta": {"heads": 4},
        },
    ),
}


@functools.cache
def problem(where):
    rng = np.random.default_rng(0)
    if where == "net":
        x, y = (jnp.asarray(rng.normal(size=(16, 8)), jnp.float32) for _ in range(2))
        loss = lambda lora, variables: jnp.square(lora.apply(variables, x) - y).mean()
        return Problem(Net(), random_params(Net(), x), loss)
    model, params, *_ = load_pretrained(base_directory())
    batch = make_batch([Example(tuple(map(int, rng.integers(0, 200, 12))), 2) for _ in range(4)])
    return Problem(model, params, lambda lora, variables: summed_loss(lora, variables, batch, None) / 40)


def spec_of(parametrization, init, where="net"):
    chosen = CHOSEN[where]
    targets = chosen.others.get(parametrization, chosen.targets)
    options = chosen.options.get(parametrization, {})
    return LoraSpec(rank=2, target_modules=targets, parametrization=parametrization, init=init, options=options)


def makes_sense(parametrization, init, optimizer):
    try:
        spec = spec_of(parametrization, init)
    except InputError:
        return False
    return optimizer == "adamw" or trains_pairs(spec)


PRODUCT = [c for c in itertools.product(PARAMETRIZATIONS, INITIALIZERS, OPTIMIZERS) if makes_sense(*c)]


OF_CONVOLUTIONS = {name for name, member in PARAMETRIZATIONS.items() if hasattr(member, "READS_AXES")}  # else LoRA
NO_PAIR = sorted(row[0] for row in PRODUCT if PARAMETRIZATIONS[row[0]].PAIR == "none" and row[0] not in OF_CONVOLUTIONS)
SHORT = [
    ("lora", "kaiming", "stable_lora"),
    ("lora", "pissa", "adamw"),
    ("lora", "init_ab", "lora_rite"),
    ("lora", "init_ab_off", "adamw"),
    ("lora", "lora_ga", "lora_rite"),
    ("lora", "eva", "stable_lora"),
    ("dora", "gaussian", "adamw"),
    ("dora", "loftq", "adamw"),
    ("dora", "olora", "stable_lora"),
    ("dora", "milora", "lora_rite"),
    ("adalora", "orthogonal", "stable_lora"),
    ("slora", "init_b", "adamw"),
    ("slora", "cora", "adamw"),
    ("slora", "pissa_niter_4", "stable_lora"),
    ("slora", "svd", "lora_rite"),
    ("slora", "nystrom", "adamw"),
    ("inttune", "nystrom", "adamw"),
    ("lora_xs", "svd", "adamw"),
    ("lora_xs", "lora_sb", "adamw"),
    ("edora", "orthogonal", "adamw"),
    ("reslora", "kaiming", "stable_lora"),
    *((name, "kaiming", "adamw") for name in NO_PAIR),
]


def rows():
    for row in PRODUCT:
        covering = row in SHORT
        yield ("net", *row) if covering else long("net", *row)
        yield long("base", *row) if covering else soak("base", *row)


def test_the_short_rows_cover_every_member():
    parametrizations, inits, names = map(set, zip(*SHORT, strict=True))
    assert (parametrizations, inits, names) == (
        set(PARAMETRIZATIONS) - OF_CONVOLUTIONS,
        set(INITIALIZERS),
        set(OPTIMIZERS),
    )


@pytest.mark.parametrize("where,parametrization,init,optimizer", rows())
def test_training_lowers_the_loss(where, parametrization, init, optimizer):
    model, params, loss = problem(where)
    spec, tx = spec_of(parametrization, init, where), OPTIMIZERS[optimizer]()
    lora = adapted(model, spec)
    calibration = random_calibration(params, spec)
    adapters = jit(lambda params: init_adapters(jax.random.key(0), params, spec, calibration=calibration))(params)

    def loss_of(trained, frozen, params):
        return loss(lora, {"params": params, "lora": with_frozen(trained, frozen)})

    @jit
    def steps(state, params):
        def step(state, _):
            value, grads = jax.value_and_grad(loss_of)(*split_frozen(state.adapters), params)
            state, metrics = updated(state, tx, value, grads)
            return state, metrics["loss"]

        return jax.lax.scan(step, state, length=STEPS)

    state, losses = steps(init_state(adapters, tx, jax.random.key(1)), params)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 1e-4
    assert int(state.skipped) == 0
    after = tree.leaves_by_path(state.adapters)
    for path, leaf in tree.leaves_by_path(adapters).items():
        assert np.array_equal(leaf, after[path]) == is_frozen(path[-1]), path


def test_weight_decay_reaches_nothing_that_is_frozen():
    """And nothing that is frozen has moments."""
    params = problem("net").params
    adapters = jit(lambda params: init_adapters(jax.random.key(0), params, spec_of("lora", "pissa")))(params)
    tx = optax.adamw(0.1, weight_decay=0.5)
    state = init_state(adapters, tx, jax.random.key(1))
    assert not any(is_frozen(path[-1]) for path in tree.leaves_by_path(state.opt_state[0].mu))
    grads = jax.tree.map(jnp.zeros_like, split_frozen(adapters)[0])
    after = updated(state, tx, jnp.zeros(()), grads)[0].adapters
    pair, was = (tree.get_in(t, ("up",)) for t in (after, adapters))
    np.testing.assert_array_equal(pair["frozen_a"], was["frozen_a"])
    np.testing.assert_allclose(pair["lora_a"], 0.95 * was["lora_a"], rtol=1e-6)
