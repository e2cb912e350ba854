"""The axes multiply: every parametrisation with every initialisation and optimizer trains, by one and the same code."""

import functools
import itertools

import chex
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
from stablelora_jax.training import checkpoint
from stablelora_jax.training.loss import summed_loss
from stablelora_jax.training.step import init_state, updated
from stablelora_jax.utils import tree
from tests.helpers import jit, long, soak

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "stable_lora": lambda: optimizers.stable_lora(1e-2, shrink_ratio=5e-3),
    "lora_rite": lambda: optimizers.lora_rite(1e-2),
}
STEPS = 20


OPTIONS = {"vblora": {"vectors": 16, "length": 32}, "unilora": {"length": 512}, "lorta": {"heads": 4}}
CHOSEN = {"lorta": ["q_proj", "o_proj"]}  # where all kernels have one size


def spec_of(parametrization, init):
    options = OPTIONS.get(parametrization, {})
    chosen = {"target_modules": CHOSEN.get(parametrization, ["q_proj", "down_proj"]), "options": options}
    return LoraSpec(rank=4, parametrization=parametrization, init=init, **chosen)


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
    ("dora", "gaussian", "adamw"),
    ("dora", "olora", "stable_lora"),
    ("dora", "milora", "lora_rite"),
    ("adalora", "orthogonal", "stable_lora"),
    ("slora", "init_b", "adamw"),
    ("slora", "pissa_niter_4", "stable_lora"),
    ("slora", "svd", "lora_rite"),
    ("lora_xs", "svd", "adamw"),
    ("edora", "orthogonal", "adamw"),
    ("reslora", "kaiming", "stable_lora"),
    *((name, "kaiming", "adamw") for name in NO_PAIR),
]


def rows():
    for row in PRODUCT:
        yield row if row in SHORT else long(*row) if row[2] == "adamw" else soak(*row)


@functools.cache
def base():
    model, params, *_ = load_pretrained(base_directory())
    rng = np.random.default_rng(0)
    batch = make_batch([Example(tuple(map(int, rng.integers(0, 200, 12))), 2) for _ in range(4)])
    return model, params, batch


def test_the_short_rows_cover_every_member():
    parametrizations, inits, names = map(set, zip(*SHORT, strict=True))
    assert (parametrizations, inits, names) == (
        set(PARAMETRIZATIONS) - OF_CONVOLUTIONS,
        set(INITIALIZERS),
        set(OPTIMIZERS),
    )


@pytest.mark.parametrize("parametrization,init,optimizer", rows())
def test_training_lowers_the_loss(parametrization, init, optimizer, tmp_path):
    """And goes on from a checkpoint with the bits that were saved."""
    model, params, batch = base()
    spec, tx = spec_of(parametrization, init), OPTIMIZERS[optimizer]()
    lora = adapted(model, spec)
    adapters = init_adapters(jax.random.key(0), params, spec)
    frozen = split_frozen(adapters)[1]

    def loss_of(trained, params):
        return summed_loss(lora, {"params": params, "lora": with_frozen(trained, frozen)}, batch, None) / 40

    @jit
    def step(state, params):
        loss, grads = jax.value_and_grad(loss_of)(split_frozen(state.adapters)[0], params)
        return updated(state, tx, loss, grads)

    state, losses = init_state(adapters, tx, jax.random.key(1)), []
    for number in range(STEPS):
        state = restored(state, tmp_path) if number == STEPS // 2 else state
        state, metrics = step(state, params)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 1e-4
    assert int(state.skipped) == 0
    after = tree.leaves_by_path(state.adapters)
    for path, leaf in tree.leaves_by_path(adapters).items():
        assert np.array_equal(leaf, after[path]) == is_frozen(path[-1]), path


def restored(state, directory):
    """``state`` written by one manager and read by another, compared."""
    host = jax.tree.map(np.asarray, state)
    manager = checkpoint.open_manager(directory)
    checkpoint.save(manager, 1, host)
    manager.wait_until_finished()
    manager.close()
    again = checkpoint.restore(checkpoint.open_manager(directory), jax.tree.map(np.zeros_like, host))
    chex.assert_trees_all_equal(again, host)
    chex.assert_trees_all_equal_dtypes(again, host)
    return again


def test_weight_decay_reaches_nothing_that_is_frozen():
    """And nothing that is frozen has moments."""
    _, params, _ = base()
    adapters = init_adapters(jax.random.key(0), params, spec_of("lora", "pissa"))
    tx = optax.adamw(0.1, weight_decay=0.5)
    state = init_state(adapters, tx, jax.random.key(1))
    assert not any(is_frozen(path[-1]) for path in tree.leaves_by_path(state.opt_state[0].mu))
    grads = jax.tree.map(jnp.zeros_like, split_frozen(adapters)[0])
    after = updated(state, tx, jnp.zeros(()), grads)[0].adapters
    pair, was = (tree.get_in(t, ("model", "layers", "self_attn", "q_proj")) for t in (after, adapters))
    np.testing.assert_array_equal(pair["frozen_a"], was["frozen_a"])
    np.testing.assert_allclose(pair["lora_a"], 0.95 * was["lora_a"], rtol=1e-6)
