"""Every method of ``configs/methods`` is a configuration whose adapters and optimizer can be made."""

from pathlib import Path

import pytest

from stablelora_jax.config import load
from stablelora_jax.config.run import RunConfig
from stablelora_jax.rank_allocation import RANK_ALLOCATIONS
from stablelora_jax.runs.dry_run import shapes

FILES = sorted((Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_of_it_can_begin(file):
    config = load(RunConfig, str(file), [])
    assert shapes(config).state.opt_state
    axes = config.lora.parametrization, config.lora.init, config.lora.scaling, config.optimizer.name
    allocation = config.rank_allocation and config.rank_allocation.name
    assert file.stem in (*axes, allocation, "lora") and allocation in (None, file.stem)


def test_every_rank_allocation_has_one():
    assert set(RANK_ALLOCATIONS) <= {file.stem for file in FILES}
