"""Every method of ``configs/methods`` goes on from a checkpoint with the bits of a run that was never stopped."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import init_adapters, merge
from stablelora_jax.config import load
from stablelora_jax.config.run import RunConfig
from stablelora_jax.lora.leaves import split_frozen, with_frozen
from stablelora_jax.runs.build import make_hyperparams, make_training
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import init_state, updated
from tests.helpers import jit, long, random_calibration, tiny_decoder

FILES = {file.stem: file for file in (Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml")}
SMALL = ["lora.rank=2", "lora.target_modules=[q_proj, down_proj]", "steps=4", "schedule.warmup_steps=1"]
OWN = {
    "adalora": ["rank_allocation={target_rank: 1, tinit: 1, tfinal: 1}"],
    "squeeze": ["rank_allocation.target_rank=1"],  # at its cuts: tests/rank_allocation
    "lorta": ["lora.target_modules=[q_proj, o_proj]"],
    "unilora": ["lora.options={length: 16}"],
    "vblora": ["lora.options={vectors: 16, length: 8}"],
}
# Their state has the leaves and the updates of another method's.
LONG = ("gaussian", "init_b", "lora_plus", "milora", "olora", "orthogonal", "rslora", "sbora_fb")


@functools.cache
def base():
    return tiny_decoder(num_hidden_layers=2)[1]


def programs(config, params):
    """``seed -> (state, hyperparams)`` and ``(state, hyperparams) -> state``, of a loss of the merged kernels."""

    @jit
    def start(seed):
        calibration = random_calibration(params, config.lora)
        adapters = init_adapters(jax.random.key(seed), params, config.lora, calibration=calibration)
        hyperparams = make_hyperparams(config, adapters)
        tx = make_training(config, params, adapters)[0](hyperparams)
        return init_state(adapters, tx, jax.random.key(seed)), hyperparams

    @jit
    def step(state, hyperparams):
        tx, trained = make_training(config, params, state.adapters)
        own, frozen = split_frozen(state.adapters)

        def loss_of(own):
            merged = merge(params, with_frozen(trained(own), frozen), config.lora)
            return sum(jnp.square(leaf - 0.1).sum() for leaf in jax.tree.leaves(merged))

        return updated(state, tx(hyperparams), *jax.value_and_grad(loss_of)(own))[0]

    return start, step


@pytest.mark.parametrize("name", [long(name) if name in LONG else name for name in sorted(FILES)])
def test_four_steps_are_two_and_two(name, tmp_path):
    config = load(RunConfig, str(FILES[name]), [*SMALL, *OWN.get(name, [])])
    start, step = programs(config, base())
    state, hyperparams = start(0)
    states = [state := step(state, hyperparams) for _ in range(4)]
    checkpoint.save(tmp_path, 2, jax.tree.map(np.asarray, states[1]))
    state = checkpoint.restore(tmp_path, jax.tree.map(np.zeros_like, start(1)[0]))
    for _ in range(2):
        state = step(state, hyperparams)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, states[3])
    jax.tree.map(np.testing.assert_array_equal, state, states[3])
    assert int(state.step) == 4 and int(state.skipped) == 0
    before, after = (jax.tree.leaves(split_frozen(of.adapters)[0]) for of in (states[1], state))
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True)), "the second half trains"
