"""Whole runs, short: what they leave behind, and that an interrupted one ends as if nothing had happened."""

import json
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from stablelora_jax import InputError, LoraSpec, adapted, base_directory, config, load_peft, load_pretrained
from stablelora_jax.build import make_optimizer, make_schedule
from stablelora_jax.run import run
from stablelora_jax.run_config import CompareSizesTask, RunConfig, ScheduleConfig
from tests.conftest import ROOT

SHORT = RunConfig(
    task=CompareSizesTask(train_limit=64, validation_limit=16),
    lora=LoraSpec(rank=2, dropout=0.1),
    schedule=ScheduleConfig(warmup_steps=2),
    steps=6,
    batch_size=8,
    checkpoint_every=2,
)


def read(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "r"
    said = []
    return directory, run(replace(SHORT, output=str(directory)), said.append), said


def test_what_a_run_leaves_behind(finished):
    directory, summary, said = finished
    assert {p.name for p in directory.iterdir()} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "norms.png",
        "summary.json",
        "tensorboard",
    }
    steps = [r for r in read(directory) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "shrinking", "norm_a", "norm_b"}
    assert all(wanted <= set(r) and all(np.isfinite(r[k]) for k in wanted) for r in steps)
    assert steps[0]["shrinking"] == 2 * load_pretrained(base_directory())[0].config.num_hidden_layers
    np.testing.assert_allclose(steps[0]["norm_b"], 0, atol=1e-9), "the first update has learning rate 0"
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert summary["before"]["questions"] == 16 and 0 <= summary["after"]["acc"] <= 1
    assert any("before:" in text and "after:" in text for text in said)
    assert len(list((directory / "tensorboard").iterdir())) >= 1


def test_the_adapter_is_in_pefts_layout_and_changes_the_model(finished):
    directory, _, _ = finished
    model, params = load_pretrained(base_directory())
    adapters, spec = load_peft(directory / "adapter", params)
    assert spec == SHORT.lora
    x = np.arange(20)[None]
    y, base = adapted(model, spec).apply({"params": params, "lora": adapters}, x), model.apply({"params": params}, x)
    assert np.abs(y - base).max() > 1e-4


def test_the_same_command_again_trains_nothing(finished):
    directory, summary, _ = finished
    before, said = (directory / "metrics.jsonl").read_bytes(), []
    assert run(replace(SHORT, output=str(directory)), said.append) == summary
    assert (directory / "metrics.jsonl").read_bytes() == before and "is finished" in said[0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "measured"
    run(replace(SHORT, output=str(directory), stability_every=3), lambda _: None)
    return directory


def test_the_stability_terms_are_written_and_drawn_where_they_are_asked_for(finished, measured):
    records = {r["step"]: r for r in read(measured) if "loss" in r}
    assert [step for step, record in records.items() if "stability" in record] == [3, 6]
    assert not any("stability" in record for record in read(finished[0]))
    for step in (3, 6):
        terms = records[step]["stability"]
        assert len(terms) == 2 * load_pretrained(base_directory())[0].config.num_hidden_layers
        assert "model.layers.0.self_attn.q_proj" in terms
        for pair in terms.values():
            assert pair.keys() == {"delta1", "delta2", "delta3", "shrink", "a", "b", "shrinking"}
            assert min(pair.values()) > 0 and np.isfinite(sum(pair.values())) and pair["shrinking"] is True
            assert pair["delta1"] > pair["delta2"] + pair["delta3"] and pair["a"] > pair["b"]
            assert 0 < pair["shrink"] < pair["delta1"]
    assert (measured / "stability.png").stat().st_size > 10_000
    board = b"".join(file.read_bytes() for file in (measured / "tensorboard").iterdir())
    assert b"stability/delta1" in board and b"train/stability" not in board


def test_to_measure_changes_nothing_else(finished, measured):
    name = "adapter/adapter_model.safetensors"
    chex.assert_trees_all_equal(load_file(measured / name), load_file(finished[0] / name))
    others = lambda d: [{k: v for k, v in r.items() if k not in ("tokens_per_second", "stability")} for r in read(d)]
    assert others(measured) == others(finished[0])


def test_without_the_key_nothing_is_measured_compiled_or_copied(tmp_path, monkeypatch):
    from stablelora_jax import run as module
    from stablelora_jax import train

    def refuse(*_, **__):
        raise AssertionError("asked for")

    monkeypatch.setattr(train, "stability", refuse)
    monkeypatch.setattr(module.jnp, "copy", refuse)
    run(replace(SHORT, output=str(tmp_path / "r"), steps=2, evaluate=False), lambda _: None)
    with pytest.raises(AssertionError, match="asked for"):
        run(replace(SHORT, output=str(tmp_path / "s"), steps=2, evaluate=False, stability_every=1), lambda _: None)


def test_another_configuration_does_not_touch_it(finished):
    with pytest.raises(InputError, match="another seed"):
        run(replace(SHORT, output=str(finished[0]), seed=1))


@pytest.mark.parametrize("stop_after,whole", [(1, "finished"), (3, "finished"), (5, "measured")])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(request, tmp_path, monkeypatch, stop_after, whole):
    from stablelora_jax import log

    write = log.RunLog.write_step

    def interrupt(self, step, metrics):
        write(self, step, metrics)
        if step == stop_after:
            raise KeyboardInterrupt

    whole = request.getfixturevalue(whole)
    whole, every = (whole, 3) if not isinstance(whole, tuple) else (whole[0], None)
    mine = replace(SHORT, output=str(tmp_path / "r"), stability_every=every)
    monkeypatch.setattr(log.RunLog, "write_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(mine, lambda _: None)
    monkeypatch.setattr(log.RunLog, "write_step", write)
    said = []
    run(mine, said.append)
    name = "adapter/adapter_model.safetensors"
    chex.assert_trees_all_equal(load_file(tmp_path / "r" / name), load_file(whole / name))
    timeless = lambda d: [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read(d)]
    assert timeless(tmp_path / "r") == timeless(whole)


def test_the_schedule_warms_up_and_ends_at_zero():
    for name, middle in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        cfg = replace(SHORT, steps=110, schedule=ScheduleConfig(name, 10))
        schedule, peak = make_schedule(cfg), SHORT.optimizer.learning_rate
        np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0, peak / 2, peak], rtol=1e-5)
        np.testing.assert_allclose(schedule(60), middle * peak, rtol=1e-5)
        np.testing.assert_allclose(schedule(110), peak if name == "constant" else 0, atol=1e-12)
    no_warmup = make_schedule(replace(SHORT, schedule=ScheduleConfig("cosine", 0)))
    np.testing.assert_allclose(no_warmup(0), SHORT.optimizer.learning_rate, rtol=1e-6)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(batch_size=7), "batch_size 7 does not divide over 8 devices"),
        (dict(length=100_000), "length 100000 is more than"),
        (dict(stability_every=0), "stability_every must be at least 1"),
        (dict(lora=LoraSpec(target=["q_prj"])), "target 'q_prj' matches no module"),
    ],
)
def test_unusable_input_is_refused_before_training(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(replace(SHORT, output=str(tmp_path / "r"), **change), lambda _: None)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load_and_build(path):
    loaded = config.load(RunConfig, path)
    pair = {"p": {"lora_a": np.ones((4, 2), np.float32), "lora_b": np.zeros((2, 4), np.float32)}}
    tx = make_optimizer(loaded, pair)
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), pair)
