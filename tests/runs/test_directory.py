"""A run directory belongs to one configuration."""

from dataclasses import replace

import pytest

from stablelora_jax import InputError, LoraSpec, config
from stablelora_jax.config.run import ArcTask, RunConfig
from stablelora_jax.runs.directory import create, default_directory, locate, read_summary


def claim(run_config):
    located = locate(run_config)
    create(located, run_config)
    return located.path


def test_claim_is_idempotent_for_the_same_configuration(tmp_path):
    mine = RunConfig(output=str(tmp_path / "r"), lora=LoraSpec(rank_pattern={"q_proj": 2}))
    assert claim(mine) == claim(mine) == tmp_path / "r"
    assert config.load(RunConfig, tmp_path / "r" / "config.yaml") == mine
    assert read_summary(tmp_path / "r") is None


def test_another_configuration_is_refused_and_named(tmp_path):
    mine = RunConfig(output=str(tmp_path / "r"))
    claim(mine)
    before = (tmp_path / "r" / "config.yaml").read_bytes()
    with pytest.raises(
        InputError, match=r"\(lora.rank is 8 there and 2 here; seed is 0 there and 4 here\): choose another output="
    ):
        claim(replace(mine, seed=4, lora=LoraSpec(rank=2)))
    assert (tmp_path / "r" / "config.yaml").read_bytes() == before


def test_a_directory_that_another_process_has_written_in_the_meantime_is_refused(tmp_path):
    mine = RunConfig(output=str(tmp_path / "r"))
    located = locate(mine)
    claim(replace(mine, seed=4))
    before = (tmp_path / "r" / "config.yaml").read_bytes()
    with pytest.raises(InputError, match="another process has written to .*/r in the meantime: start again"):
        create(located, mine)
    assert (tmp_path / "r" / "config.yaml").read_bytes() == before


def test_a_directory_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match="is no run directory"):
        claim(RunConfig(output=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is no run directory"):
        claim(RunConfig(output=str(tmp_path / "thesis.tex")))
    with pytest.raises(InputError, match="cannot write"):
        locate(RunConfig(output=str(tmp_path / "thesis.tex" / "r")))
    assert locate(RunConfig(output=str(tmp_path / "new" / "r"))) and not (tmp_path / "new").exists()


def test_the_default_directory_differs_with_every_key_but_output():
    names = {
        default_directory(c) for c in (RunConfig(), RunConfig(seed=1), RunConfig(steps=7), RunConfig(task=ArcTask()))
    }
    assert len(names) == 4 and default_directory(RunConfig(output="x")) == default_directory(RunConfig())
