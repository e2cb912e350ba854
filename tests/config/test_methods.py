"""Every method of ``configs/methods`` is a configuration whose adapters and optimizer can be made."""

from pathlib import Path

import pytest

from stablelora_jax.config import load
from stablelora_jax.config.run import RunConfig
from stablelora_jax.runs.dry_run import shapes

FILES = sorted((Path(__file__).parents[2] / "configs" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_of_it_can_begin(file):
    config = load(RunConfig, str(file), [])
    assert shapes(config).state.opt_state
    words = file.stem in (config.lora.parametrization, config.lora.init, config.lora.scaling, config.optimizer.name)
    assert words or file.stem == "lora"
