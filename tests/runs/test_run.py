"""Whole runs, short: what they leave behind, and that an interrupted one ends as if nothing had happened."""

import json
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from stablelora_jax import InputError, LoraSpec, adapted, base_directory, config, load_peft, load_pretrained
from stablelora_jax.config.run import CompareSizesTask, DataConfig, RunConfig
from stablelora_jax.config.schedule import Constant, Cosine, Linear
from stablelora_jax.interop.export import open_source
from stablelora_jax.quantization import is_quantized
from stablelora_jax.runs.build import make_optimizer, make_schedule
from stablelora_jax.runs.run import run
from stablelora_jax.training.metrics import norm_summary
from stablelora_jax.utils.errors import RunError
from tests.conftest import ROOT
from tests.helpers import long

SHORT = RunConfig(
    task=CompareSizesTask(train_limit=64, validation_limit=16),
    lora=LoraSpec(rank=2, dropout=0.1),
    schedule=Cosine(warmup_steps=2),
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


def test_what_peft_has_no_form_for_is_refused_before_training(tmp_path):
    chosen = config.load(
        RunConfig,
        ROOT / "configs" / "default.yaml",
        ["lora.target_modules=[embed_tokens]", "lora.parametrization=dora", f"output={tmp_path / 'r'}"],
    )
    with pytest.raises(
        InputError, match="PEFT has no dora for an embedding that is tied to the head: untie them first"
    ):
        run(chosen, lambda _: None)
    assert not (tmp_path / "r").exists()


def test_a_run_that_learns_nothing_fails_and_keeps_no_adapter(tmp_path):
    lora = LoraSpec(rank=2, alpha=1e38)
    chosen = replace(SHORT, lora=lora, steps=3, evaluate=False, max_grad_norm=None, output=str(tmp_path / "r"))
    for _ in range(2):  # the same command again says the same
        with pytest.raises(RunError, match="none of the 3 steps was applied.*no adapter is written. Try a smaller"):
            run(chosen, lambda _: None)
    assert not (tmp_path / "r/adapter").exists() and not (tmp_path / "r/summary.json").exists()
    assert [record.get("skipped") for record in read(tmp_path / "r")[1:]] == [True] * 3


@pytest.mark.long
def test_the_adapter_of_a_quantised_run_names_its_base(tmp_path):
    directory = tmp_path / "r"
    run(
        replace(SHORT, model=replace(SHORT.model, quantize="nf4"), evaluate=False, steps=3, output=str(directory)),
        print,
    )
    of_run, of_adapter = open_source(directory), open_source(directory / "adapter")
    chex.assert_trees_all_equal(of_adapter.params, of_run.params)
    assert sum(map(is_quantized, jax.tree.leaves(of_run.params, is_leaf=is_quantized))) == 7


def test_what_a_run_leaves_behind(finished):
    directory, summary, said = finished
    assert {p.name for p in directory.iterdir()} == {
        ".lock",
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
    assert (measured / "stability.png").is_file()  # what is in it: test_plots
    board = b"".join(file.read_bytes() for file in (measured / "tensorboard").iterdir())
    assert b"stability/delta1" in board and b"train/stability" not in board


def test_to_measure_changes_nothing_else(finished, measured):
    name = "adapter/adapter_model.safetensors"
    chex.assert_trees_all_equal(load_file(measured / name), load_file(finished[0] / name))
    others = lambda d: [{k: v for k, v in r.items() if k not in ("tokens_per_second", "stability")} for r in read(d)]
    assert others(measured) == others(finished[0])


def test_without_the_key_nothing_is_measured_compiled_or_copied(tmp_path, monkeypatch):
    from stablelora_jax.runs import loop as module
    from stablelora_jax.training import step as train

    def refuse(*_, **__):
        raise AssertionError("asked for")

    monkeypatch.setattr(train, "stability", refuse)
    monkeypatch.setattr(module.jnp, "copy", refuse)
    run(replace(SHORT, output=str(tmp_path / "r"), steps=2, evaluate=False), lambda _: None)
    with pytest.raises(AssertionError, match="asked for"):
        run(replace(SHORT, output=str(tmp_path / "s"), steps=2, evaluate=False, stability_every=1), lambda _: None)


def test_another_configuration_does_not_touch_it(finished):
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        run(replace(SHORT, output=str(finished[0]), seed=1))


@pytest.mark.parametrize("stop_after,whole", [(1, "finished"), long(3, "finished"), long(5, "measured")])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(request, tmp_path, monkeypatch, stop_after, whole):
    from stablelora_jax.runs import log

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


OFTEN = replace(SHORT, evaluate_every=2, select="best", keep_checkpoints=9)


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations that cost nothing: adapters never seen before get the next value, known ones what they had."""
    from stablelora_jax.runs import loop

    def script(*values):
        known, rest, asked = {}, list(values), []

        def measure(job, adapters, *_):
            adapters = job.layout.fetch(adapters)
            content = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(adapters))
            if content not in known:
                known[content] = rest.pop(0)
            asked.append(known[content])
            return {"loss": known[content], "acc": -known[content], "answers": [0] * 16, "questions": 16}

        monkeypatch.setattr(loop, "evaluate", measure)
        return asked

    return script


def evaluated(directory):
    return {r["step"]: r["validation"]["loss"] for r in read(directory) if "validation" in r}


def test_the_adapter_of_the_best_evaluation_is_kept_and_none_is_made_twice(tmp_path, monkeypatch, scripted):
    from stablelora_jax.runs import log

    asked, whole, cut = scripted(9, 3, 1, 2), tmp_path / "whole", tmp_path / "cut"
    summary = run(replace(OFTEN, output=str(whole)), lambda _: None)
    assert evaluated(whole) == {0: 9, 2: 3, 4: 1, 6: 2} and asked == [9, 3, 1, 2]
    assert (summary["adapter_of_step"], summary["steps"], summary["stopped_early"]) == (4, 6, False)
    assert (summary["before"]["loss"], summary["kept"]["loss"], summary["after"]["loss"]) == (9, 1, 2)
    assert json.loads((whole / "adapter" / "stablelora.json").read_text())["steps"] == 4
    steps = {r["step"]: r for r in read(whole) if "loss" in r}
    _, params = load_pretrained(base_directory())
    kept, _ = load_peft(whole / "adapter", params)
    np.testing.assert_allclose(norm_summary(kept)["norm_b"], steps[4]["norm_b"], rtol=1e-5)
    assert steps[4]["norm_b"] != steps[6]["norm_b"]

    write = log.RunLog.write_step

    def interrupt(self, step, metrics):
        write(self, step, metrics)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(log.RunLog, "write_step", interrupt)
    del asked[:]
    with pytest.raises(KeyboardInterrupt):
        run(replace(OFTEN, output=str(cut)), lambda _: None)
    assert asked == [9, 3, 1]
    monkeypatch.setattr(log.RunLog, "write_step", write)
    del asked[:]
    said = []
    again = run(replace(OFTEN, output=str(cut)), said.append)
    assert asked == ([2] if any("going on from step 4" in line for line in said) else [1, 2]), "or step 2, if slow"
    timeless = lambda d: [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read(d)]
    assert timeless(cut) == timeless(whole) and {**again, "minutes": 0} == {**summary, "minutes": 0}
    name = "adapter/adapter_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_stops_where_nothing_gets_better(tmp_path, scripted):
    asked, directory, said = scripted(9, 3, 4), tmp_path / "r", []
    mine = replace(OFTEN, output=str(directory), patience=1, select="last", checkpoint_every=3)
    summary = run(mine, said.append)
    assert evaluated(directory) == {0: 9, 2: 3, 4: 4} and asked == [9, 3, 4]
    assert (summary["steps"], summary["stopped_early"], summary["adapter_of_step"]) == (4, True, 4)
    assert summary["after"]["loss"] == 4 and any("stopped after 4 of 6 steps" in line for line in said)
    assert [r["step"] for r in read(directory) if "loss" in r] == [1, 2, 3, 4]
    (directory / "summary.json").unlink()  # as if killed just before its end: nothing is trained or measured again
    before = read(directory)
    again = run(mine, lambda _: None)
    assert read(directory) == before and asked == [9, 3, 4] and {**again, "minutes": 0} == {**summary, "minutes": 0}


def test_packed_rows_from_a_cache_are_trained_and_counted(tmp_path):
    data, said = DataConfig(batching="pack", cache=str(tmp_path / "cache")), []
    mine = replace(SHORT, data=data, steps=2, max_length=128, evaluate=False, output=str(tmp_path / "r"))
    summary = run(mine, said.append)
    counted = summary["data"]
    assert counted["texts"] == 64 and counted["rows"] < 24 and counted["padding"] < 0.2 and counted["cut"] == 0
    assert read(tmp_path / "r")[0] == {"step": 0, "data": counted}
    assert any(f"64 texts in {counted['rows']} rows: {counted['tokens']} tokens" in line for line in said)
    records = [r for r in read(tmp_path / "r") if "loss" in r]
    assert all(0 <= r["padding"] < 0.3 and 0 < r["loss_tokens"] < 8 * 128 for r in records)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [counted["digest"]]


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path):
    mine = replace(SHORT, steps=2, evaluate=False, output=str(tmp_path / "r"))
    run(mine, lambda _: None)
    (tmp_path / "r" / "summary.json").unlink()
    metrics = tmp_path / "r" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace(read(tmp_path / "r")[0]["data"]["digest"], "other"))
    with pytest.raises(InputError, match="was begun with other training data"):
        run(mine, lambda _: None)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(evaluate_every=0), "evaluate_every must be at least 1"),
        (dict(patience=0, evaluate_every=1), "patience must be at least 1"),
        (dict(evaluate_every=1, evaluate=False), "evaluate_every needs evaluate: true"),
        (dict(patience=1), "patience needs evaluate_every"),
        (dict(select="best"), "select: best needs evaluate_every"),
    ],
)
def test_keys_of_evaluation_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        RunConfig(**change)


def test_the_schedule_warms_up_and_ends_at_zero():
    for shape, middle in ((Cosine, 0.5), (Linear, 0.5), (Constant, 1.0)):
        cfg = replace(SHORT, steps=110, schedule=shape(warmup_steps=10))
        schedule, peak = make_schedule(cfg), SHORT.optimizer.learning_rate
        np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [0, peak / 2, peak], rtol=1e-5)
        np.testing.assert_allclose(schedule(60), middle * peak, rtol=1e-5)
        np.testing.assert_allclose(schedule(110), peak if shape is Constant else 0, atol=1e-12)
    no_warmup = make_schedule(replace(SHORT, schedule=Cosine()))
    np.testing.assert_allclose(no_warmup(0), SHORT.optimizer.learning_rate, rtol=1e-6)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(batch_size=7), "a batch of 7 rows does not divide over 8 devices: batch_size must be a multiple of 8"),
        (dict(max_length=100_000), "max_length 100000 is more than"),
        (dict(data=DataConfig(chat_template=True)), "has no chat template"),
        (dict(data=DataConfig(truncate="error"), max_length=16), "more than max_length=16: raise max_length"),
        (dict(stability_every=0), "stability_every must be at least 1"),
        (dict(lora=LoraSpec(target_modules=["q_prj"])), "target_modules 'q_prj' matches no module"),
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


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"attention": "cudnn"}, "cudnn attention needs a gpu, and here is a cpu: choose auto"),
        ({"attention": "splash"}, "splash attention needs a tpu, and here is a cpu: choose auto"),
        ({"remat": "everything", "quantize": "nf4"}, "choose save_dots"),
    ],
)
def test_a_way_that_cannot_be_taken_here_is_refused_before_anything_is_written(changes, message, tmp_path):
    config = replace(SHORT, model=replace(SHORT.model, **changes), output=str(tmp_path / "r"))
    with pytest.raises(InputError, match=message):
        run(config, print)
    assert not (tmp_path / "r").exists()
