"""The calibration of a run is that of its batches, however they lie on devices, and a run that resumes makes none."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, calibrate, summed_loss
from stablelora_jax.config.run import CompareSizesTask, ModelConfig, RunConfig
from stablelora_jax.data import batch_of_step, make_loader
from stablelora_jax.data.token_cache import TokenStore
from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.runs import prepare as preparation
from stablelora_jax.runs.calibrate import make_calibration
from stablelora_jax.runs.directory import identity
from stablelora_jax.utils import tree
from tests.helpers import long, tiny_decoder

LAYOUTS = {
    "2 devices, 2 micro-batches": lambda: (pmap_layout(jax.devices()[:2]), 2),
    "mesh": lambda: (mesh_layout(2, 2, 2, key_value_heads=2), 2),
}
SHORT = RunConfig(task=CompareSizesTask(train_limit=32), calibration_batches=2, batch_size=8, steps=2, evaluate=False)


def loader():
    """Texts of uneven length, so that each part has another number of loss tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 30, 32).astype(np.int32)
    tokens, ends = rng.integers(0, 31, lengths.sum()).astype(np.int32), np.cumsum(lengths)
    store = TokenStore(tokens, lengths, lengths // 2, np.arange(32), ends, 0, "")
    return make_loader(store, batching="bucket", max_length=64, batch_size=8, seed=0)


@pytest.mark.parametrize("init", ["lora_ga", long("eva")])
@pytest.mark.parametrize("name", ["2 devices, 2 micro-batches", long("mesh")])
def test_it_is_that_of_the_first_batches(name, init):
    (layout, micros), (model, params) = LAYOUTS[name](), tiny_decoder()
    spec = LoraSpec(rank=2, init=init, target_modules=["q_proj"])
    lora = adapted(model, spec)
    config = replace(SHORT, lora=spec, gradient_accumulation_steps=micros)
    found = make_calibration(config, "", layout, lora, layout.place_base(params), loader(), lambda _: None)
    batches = [batch_of_step(loader(), step) for step in range(2)]
    mean = lambda lora, variables, batch: summed_loss(lora, variables, batch) / batch.loss_mask.sum()
    expected = calibrate(lora, params, batches, mean, token_mask=lambda batch: batch.loss_mask)
    for path, own in tree.leaves_by_path(expected).items():
        np.testing.assert_allclose(tree.get_in(found, path), own, rtol=1e-4, atol=1e-4 * np.abs(own).max())


@pytest.mark.long
def test_a_run_starts_from_it_and_one_that_resumes_measures_nothing(tmp_path, monkeypatch):
    config, said = replace(SHORT, lora=LoraSpec(rank=2, init="loftq"), model=ModelConfig(quantize="nf4")), []
    setup = preparation.prepare(config, tmp_path, said.append)
    assert any("init loftq" in line for line in said)
    pair = setup.start.adapters["model"]["layers"]["self_attn"]["q_proj"]
    assert pair["lora_a"].any() and pair["lora_b"].any() and not setup.first_evaluation
    monkeypatch.setattr(preparation, "make_calibration", None)
    again = preparation.prepare(config, tmp_path, said.append, resumes=True)
    shapes = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes(again.start) == shapes(setup.start)


def test_the_number_of_batches_matters_where_it_is_read():
    other = replace(SHORT, calibration_batches=3)
    assert identity(other) == identity(SHORT)
    eva = LoraSpec(init="eva")
    assert identity(replace(other, lora=eva)) != identity(replace(SHORT, lora=eva))
    with pytest.raises(InputError, match="lora.init loftq corrects what a base loses: say model.quantize=nf4"):
        replace(SHORT, lora=LoraSpec(init="loftq"))
