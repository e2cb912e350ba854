"""A run that a version before November 2026 began: the same command, in today's words, goes on with it to the bit."""

import shutil
from dataclasses import replace

import jax
import pytest
import yaml

from stablelora_jax import InputError, config
from stablelora_jax.config.keys import keys_of, old_names, sections
from stablelora_jax.config.run import RunConfig
from stablelora_jax.interop.export import open_source
from stablelora_jax.runs.legacy import OldTrainState
from stablelora_jax.runs.prepare import prepare
from stablelora_jax.runs.run import run
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import TrainState
from tests.runs.test_loop import SHORT, quiet

RUN = replace(SHORT, evaluate=False, evaluate_every=None, num_samples=0, model={"remat": "save_dots"})


def with_old_names(cls, data):
    """The inverse of ``config.with_new_names``."""
    made = {}
    for key, value in data.items():
        field, kind = keys_of(cls)[key] if key in keys_of(cls) else (None, None)
        if field is not None:
            old = {new: old for old, new in (field.metadata.get("renamed") or {}).items()}
            value = old.get(value, value) if isinstance(value, str) else value
            members = sections(kind)
            value = with_old_names(members[0], value) if len(members) == 1 and value is not None else value
        made[{new: old for old, new in old_names(cls).items()}.get(key, key)] = value
    return made


def make_old(directory, step):
    """Leave ``directory`` as an older version does when it is killed after ``step`` steps."""
    for name in ("adapter", "summary.json"):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path = directory / "config.yaml"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first + yaml.safe_dump(with_old_names(RunConfig, yaml.safe_load("".join(rest))), sort_keys=False))
    metadata = checkpoint.read_metadata(directory / "checkpoints", step)
    like = prepare(RUN, directory, quiet, resumes=True).start
    state = checkpoint.restore(directory / "checkpoints", like, step=step)
    shutil.rmtree(directory / "checkpoints")
    metadata["run"] = with_old_names(RunConfig, metadata["run"])
    checkpoint.save(directory / "checkpoints", step, OldTrainState(*state), metadata)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``(whole, old)``: a run from beginning to end, and one that an older version left after four steps."""
    whole, old = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "old"))
    run(replace(RUN, output=str(whole)), quiet)
    shutil.copytree(whole, old)
    config_file = old / "config.yaml"
    config_file.write_text(config_file.read_text().replace(str(whole), str(old)))
    make_old(old, 4)
    return whole, old


def test_the_old_names_are_there_and_a_user_may_not_write_them(runs):
    text = (runs[1] / "config.yaml").read_text()
    assert all(f"{name}:" in text for name in ("length", "accumulate", "clip_norm", "target")) and "useful" in text
    with pytest.raises(InputError, match="is now called"):
        config.load(RunConfig, runs[1] / "config.yaml")


def test_another_configuration_is_refused_in_one_line(runs):
    with pytest.raises(InputError, match="another configuration .max_length is 256 there and 64 here.") as said:
        run(replace(RUN, output=str(runs[1]), max_length=64), quiet)
    assert "\n" not in str(said.value)


def test_it_goes_on_to_the_same_bits(runs, tmp_path):
    whole, old = runs
    shutil.copytree(old, tmp_path / "old")
    path = tmp_path / "old" / "config.yaml"
    path.write_text(path.read_text().replace(str(old), str(tmp_path / "old")))
    run(replace(RUN, output=str(tmp_path / "old")), quiet)
    mine, theirs = (open_source(directory).adapters for directory in (tmp_path / "old", whole))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True))
    assert checkpoint.latest(tmp_path / "old" / "checkpoints") == RUN.steps


def test_the_leaves_of_an_old_state_are_those_of_todays():
    assert [n.replace("in_a_row", "consecutive_skips") for n in OldTrainState._fields] == list(TrainState._fields)
