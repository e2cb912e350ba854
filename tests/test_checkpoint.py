"""Orbax keeps a training state to the last bit, optimizer state and latches included."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, checkpoint, init_adapters, stable_lora, still_shrinking
from stablelora_jax.train import init_state
from tests.helpers import tiny_decoder, trained


def make_state(spec=None, seed=5):
    _, params = tiny_decoder()
    spec = spec or LoraSpec(layers=(0, 2))
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec, seed)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), stable_lora(optax.cosine_decay_schedule(1e-2, 9), shrink_ratio=1e-2)
    )
    state = init_state(adapters, tx, jax.random.key(3))
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, adapters), state.opt_state, adapters)
    return jax.tree.map(np.asarray, state._replace(step=state.step + 1, opt_state=opt_state))


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state()
    manager = checkpoint.open_manager(tmp_path / "c")
    checkpoint.save(manager, 1, state)
    manager.wait_until_finished()
    manager.close()
    again = checkpoint.restore(checkpoint.open_manager(tmp_path / "c"), make_state(seed=9))
    chex.assert_trees_all_equal(again, state)
    assert type(again) is type(state) and still_shrinking(again.opt_state) == still_shrinking(state.opt_state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    manager = checkpoint.open_manager(tmp_path / "c", keep=2)
    for step in (1, 2, 3, 3):
        checkpoint.save(manager, step, make_state()._replace(step=np.int32(step)))
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 3]
    assert checkpoint.restore(manager, make_state()).step == 3


def test_no_checkpoint_and_a_foreign_one_are_errors(tmp_path):
    manager = checkpoint.open_manager(tmp_path / "c")
    with pytest.raises(InputError, match="no complete checkpoint"):
        checkpoint.restore(manager, make_state())
    checkpoint.save(manager, 1, make_state())
    manager.wait_until_finished()
    with pytest.raises(InputError, match="checkpoint 1 in .* cannot be read") as error:
        checkpoint.restore(manager, make_state(LoraSpec(rank=3, target=["k_proj"])))
    assert "\n" not in str(error.value)
