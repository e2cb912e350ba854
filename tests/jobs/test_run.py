"""Jobs are runs: equal to each alone, resumed to the same bits whatever ends the process, and none ends another."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from stablelora_jax.cli.main import main
from stablelora_jax.config.run import RunConfig
from stablelora_jax.jobs import run as module
from stablelora_jax.jobs.file import load_jobs, read_record
from stablelora_jax.jobs.rounds import Rounds
from stablelora_jax.jobs.run import run_jobs
from stablelora_jax.runs import loop
from stablelora_jax.runs.run import run
from stablelora_jax.training import checkpoint
from stablelora_jax.utils.errors import InputError, Interrupted
from tests.helpers import long, soak

TEXT = """
output: OUT
at_once: 3
common:
  {steps: 6, batch_size: 8, checkpoint_every: 2, evaluate: false, trackers: [], schedule: {warmup_steps: 1},
   task: {train_limit: 100}}
jobs:
  r4: {lora: {rank: 4, alpha: 8}}
  dropped: {lora: {rank: 8, dropout: 0.2}, seed: 3, batch_size: 16}
  short: {lora: {rank: 4, alpha: 16}, optimizer: {shrink_ratio: 0.01}, seed: 9, steps: 3}
  plus: {lora: {rank: 4, target_modules: [q_proj, down_proj]}, optimizer: {name: lora_plus}, steps: 5}
"""
NAMES = ("r4", "dropped", "short", "plus")


def load(tmp_path, text=TEXT, *overrides):
    path = tmp_path / "jobs.yaml"
    path.write_text(text.replace("OUT", str(tmp_path / "out")))
    return load_jobs(path, overrides)


def quiet(text):
    pass


def losses(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "loss" in record]


def arrays(directory):
    """All of the newest checkpoint."""
    import orbax.checkpoint as ocp

    newest = checkpoint.latest(directory / "checkpoints")
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(directory / "checkpoints" / str(newest) / "state")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All jobs to their end, without a break; ``plus`` takes the place of ``short``."""
    place = tmp_path_factory.mktemp("jobs")
    jobs, configs = load(place)
    assert list(run_jobs(jobs, configs, quiet)) == list(NAMES)
    return place / "out"


@pytest.mark.parametrize("name", [soak("r4"), "dropped", long("short"), soak("plus")])
def test_a_job_is_as_a_run_alone(whole, tmp_path, name):
    _, configs = load(tmp_path)
    run(replace(configs[name], output=str(tmp_path / "alone")), quiet)
    mine, other = arrays(whole / name), arrays(tmp_path / "alone")
    assert mine.keys() == other.keys()
    tolerance = 1e-4 if name == "plus" else 1e-5  # Adam's first steps magnify the rounding of its smallest gradients
    for key, value in other.items():
        np.testing.assert_allclose(mine[key], value, atol=tolerance * max(1e-3, np.abs(value).max()), err_msg=key)
    pairs = zip(losses(whole / name), losses(tmp_path / "alone"), strict=True)
    assert all(step == own and abs(a / b - 1) < 1e-5 for (step, a), (own, b) in pairs)
    files = lambda path: {p.relative_to(path).as_posix() for p in path.rglob("*") if "checkpoints/" not in str(p)}
    assert files(whole / name) == files(tmp_path / "alone")


def test_a_job_goes_on_as_a_run_and_a_finished_one_is_left(whole, tmp_path):
    said = []
    jobs, configs = load(whole.parent)
    run_jobs(jobs, configs, said.append)
    assert said == [f"{name} is finished" for name in NAMES]


def interrupted(monkeypatch, at, act):
    """``act(rounds)`` in round ``at``, before it."""
    count, real = [0], Rounds.step

    def step(self, *given):
        count[0] += 1
        if count[0] == at:
            act()
        return real(self, *given)

    monkeypatch.setattr(Rounds, "step", step)


class Killed(BaseException):
    pass


def fails():
    raise Killed


def test_the_base_is_evaluated_once(whole, tmp_path, monkeypatch):
    """Of three jobs two begin as the base, with different ranks and seeds; the third goes on from an adapter."""
    common = "common: {steps: 1, batch_size: 8, trackers: [], task: {train_limit: 50, validation_limit: 16}}"
    adapter, rank = whole / "dropped" / "adapter", "lora: {rank: 8, alpha: 16}"
    own = f"jobs:\n  a: {{lora: {{rank: 2}}}}\n  b: {{seed: 4}}\n  c: {{{rank}, init_from: {adapter}}}\n"
    found, evaluate = [], loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *given: found.append(evaluate(*given)) or found[-1])
    jobs, configs = load(tmp_path, f"output: OUT\n{common}\n{own}")
    summaries = run_jobs(jobs, configs, quiet)
    assert len(found) == 2 + 3  # before training of the base and of c, and after it of each
    assert summaries["a"]["before"] == summaries["b"]["before"] != summaries["c"]["before"]
    assert summaries["a"]["after"] != summaries["b"]["after"]
    monkeypatch.undo()
    alone = run(replace(configs["b"], output=str(tmp_path / "alone")), quiet)
    np.testing.assert_allclose(alone["before"]["loss"], summaries["b"]["before"]["loss"], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("at", [2, 5, soak(4), soak(7)])
def test_a_kill_loses_nothing(whole, tmp_path, monkeypatch, at):
    """Also between the checkpoint of one job and that of another, and where jobs have changed since."""
    jobs, configs = load(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupted(patch, at, fails)
        run_jobs(jobs, configs, quiet)
    run_jobs(jobs, configs, quiet)
    for name in NAMES:
        for key, value in arrays(whole / name).items():
            np.testing.assert_array_equal(arrays(tmp_path / "out" / name)[key], value, err_msg=f"{name} {key}")
        assert losses(tmp_path / "out" / name) == losses(whole / name)


@pytest.mark.long
def test_a_kill_between_two_checkpoints_of_a_round(whole, tmp_path, monkeypatch):
    jobs, configs = load(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        real = checkpoint.save
        patch.setattr(checkpoint, "save", lambda m, step, *rest: fails() if step == 4 else real(m, step, *rest))
        run_jobs(jobs, configs, quiet)
    run_jobs(jobs, configs, quiet)
    for name in NAMES:
        for key, value in arrays(whole / name).items():
            np.testing.assert_array_equal(arrays(tmp_path / "out" / name)[key], value, err_msg=f"{name} {key}")


def test_a_signal_saves_all_jobs_at_one_round(whole, tmp_path, monkeypatch):
    jobs, configs = load(tmp_path)
    received = []

    @contextmanager
    def catch_signals():
        yield lambda: received[0] if received else 0

    with monkeypatch.context() as patch:
        patch.setattr(module, "catch_signals", catch_signals)
        interrupted(patch, 3, lambda: received.append(15))
        with pytest.raises(Interrupted, match="SIGTERM: all jobs are saved, and the same command goes on from there"):
            run_jobs(jobs, configs, quiet)
    steps = read_record(tmp_path / "out").steps
    assert steps["r4"] == steps["dropped"] in (3, 4)
    run_jobs(jobs, configs, quiet)
    for name in NAMES:
        assert losses(tmp_path / "out" / name) == losses(whole / name)


@pytest.mark.long
def test_a_job_that_fails_ends_no_other(tmp_path, capsys):
    text = TEXT.replace("seed: 9, steps: 3", "max_consecutive_errors: 2, max_grad_norm: null").replace(
        "shrink_ratio: 0.01", "learning_rate: 1.0e+30"
    )
    path = tmp_path / "jobs.yaml"
    path.write_text(text.replace("OUT", str(tmp_path / "out")))
    for _ in range(2):  # it is not tried again
        assert main(["train", "--jobs", str(path), "task.train_limit=50"]) == 1
        out, err = capsys.readouterr()
        assert err.count("error:") == 1 and "1 of 4 jobs failed (short)" in err
        assert "short" in out and "not finite in 2 steps in a row" in out
    shutil.rmtree(tmp_path / "out" / "short")  # begun anew, it is tried again
    assert main(["train", "--jobs", str(path), "task.train_limit=50"]) == 1
    assert "short failed: " in capsys.readouterr().out
    for name in ("r4", "dropped", "plus"):
        assert (tmp_path / "out" / name / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "short" / "adapter").exists()


APART = {
    "another base": ("short: {model: {dtype: bfloat16}}", r"jobs\.short: model must be the same for all jobs"),
    "parametrization": ("short: {lora: {parametrization: dora}}", r"jobs\.short: lora\.parametrization must be"),
    "trained in full": ("short: {lora: {modules_to_save: [embed_tokens]}}", r"jobs\.short: lora\.modules_to_save and"),
    "too long": ("short: {max_length: 100000}", r"jobs\.short: max_length 100000 is more than"),
    "pattern": ("short: {lora: {target_modules: [nothing]}}", r"jobs\.short: .*nothing"),
}


@pytest.mark.parametrize("name", APART)
def test_what_cannot_be_trained_together(tmp_path, name):
    own, message = APART[name]
    text = TEXT[: TEXT.index("  dropped")] + f"  {own}\n"
    with pytest.raises(InputError, match=message):
        run_jobs(*load(tmp_path, text), quiet)
    assert not (tmp_path / "out").exists()


def test_configurations_are_runs(tmp_path):
    _, configs = load(tmp_path)
    assert all(isinstance(config, RunConfig) for config in configs.values())
    assert Path(configs["r4"].output) == tmp_path / "out" / "r4"


def test_options_that_are_of_one_run(tmp_path, capsys):
    path = tmp_path / "jobs.yaml"
    path.write_text(TEXT)
    assert main(["train", "--jobs", str(path), "--dry-run"]) == 2
    assert "--dry-run is for one run" in capsys.readouterr().err
    assert main(["train", "--jobs", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
