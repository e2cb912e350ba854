"""Checkpoints whose leaves have the names of an older version."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import LoraSpec, freeze, freeze_mask, init_adapters, stable_lora
from stablelora_jax.config import to_dict
from stablelora_jax.config.run import RunConfig
from stablelora_jax.runs import legacy
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import TrainState, init_state
from tests.helpers import tiny_decoder, trained

SPEC = LoraSpec(rank=2, modules_to_save=["norm"])
OLD_NAMES = {"max_length": "length"}


@pytest.mark.parametrize("name", ["adamw", "stable_lora, a part frozen"])
def test_what_is_trained_in_full_is_found_under_its_old_key(name, tmp_path):
    _, params = tiny_decoder(num_hidden_layers=1)
    adapters = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    mask = freeze_mask(params, adapters, SPEC, ["q_proj.lora_a"])
    tx = optax.adamw(1e-3) if name == "adamw" else freeze(stable_lora(1e-3), mask)
    state = init_state(adapters, tx, jax.random.key(1))
    state = jax.tree.map(lambda x: x + 3 if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    run = to_dict(RunConfig())
    saved = {"run": {OLD_NAMES.get(key, key): value for key, value in run.items()}}
    assert saved["run"] != run
    checkpoint.save(tmp_path, 1, legacy.OldTrainState(*legacy._with_old_keys(tuple(state))), saved)
    record = (tmp_path / "1" / "about" / "metadata").read_text()
    assert "norm.full.scale" in record and "lora_full" not in record
    found = legacy.restore(tmp_path, jax.tree.map(jnp.zeros_like, state), 1, {"run": run})
    assert isinstance(found, TrainState)
    for (path, mine), (other, theirs) in zip(*map(jax.tree_util.tree_leaves_with_path, (found, state)), strict=True):
        assert path == other and mine.dtype == theirs.dtype
        mine, theirs = (
            jax.random.key_data(x) if x.dtype == theirs.dtype == state.key.dtype else x for x in (mine, theirs)
        )
        np.testing.assert_array_equal(mine, theirs)


def test_a_module_called_full_keeps_its_name():
    tree = (
        {"full": {"lora_full": {"kernel": 1}, "lora_a": 2}},
        optax.ScaleByAdamState(0, {"lora_full": 3}, {"full": 4}),
    )
    old = legacy._with_old_keys(tree)
    assert old[0] == {"full": {"full": {"kernel": 1}, "lora_a": 2}} and old[1].mu == {"full": 3}
    assert legacy._with_new_keys(tree, old) == tree
