"""metrics.jsonl through kills, skipped steps, full disks and many processes."""

import json
import math
import subprocess
import sys
import textwrap
import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, stable_lora
from stablelora_jax.data.tasks.question import Question
from stablelora_jax.optimizers import latches
from stablelora_jax.runs.log import open_log
from stablelora_jax.runs.summary import summarize, summary_lines
from tests.conftest import ROOT

SPEC = LoraSpec()


def opened(directory, step=0, schedule=lambda count: 0.5 * count, **given):
    return open_log(directory, step, 100, schedule, SPEC, **{"trackers": (), **given})


def metrics(loss=1.0, **more):
    return {"loss": jnp.float32(loss), "tokens": 8, "latches": (), **more}


def read(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_goes_on_as_one_that_was_never_interrupted(tmp_path):
    evaluation = {"loss": 2.5, "acc": 0.5, "answers": [0, 1], "questions": 2}
    log = opened(tmp_path)
    log.write_data({"digest": "d", "texts": 3})
    log.write_evaluation(0, evaluation)
    for step in (1, 2, 3):
        log.write_step(step, metrics(0.1 * step))
    log.write_evaluation(3, evaluation)
    log.close()
    before = read(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log = opened(tmp_path, step=2)
    assert log.history.evaluations == {0: evaluation}
    log.write_data({"digest": "d"})
    log.write_step(3, metrics(0.1 * 3))
    log.write_evaluation(3, evaluation)
    timeless = lambda records: [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]
    assert timeless(read(tmp_path)) == timeless(before) and log.history.evaluations[3] == evaluation
    assert [r["loss"] for r in read(tmp_path) if "loss" in r] == [float(np.float32(0.1 * s)) for s in (1, 2, 3)]
    with pytest.raises(InputError, match="was begun with other training data"):
        opened(tmp_path, step=3).write_data({"digest": "other"})


def test_a_skipped_step_is_marked_and_does_not_move_the_learning_rate(tmp_path):
    log = opened(tmp_path, schedule=lambda count: (10.0, 11.0, 12.0)[count])
    log.write_step(1, metrics(applied=jnp.int32(0), skipped=jnp.int32(0)))
    log.write_step(
        2, metrics(np.nan, applied=jnp.int32(1), skipped=jnp.int32(1), consecutive_skips=1, gradient_norm=jnp.inf)
    )
    log.write_step(3, metrics(applied=jnp.int32(1), skipped=jnp.int32(0)))
    one, two, three = read(tmp_path)
    assert "consecutive_skips" not in two
    assert [r["learning_rate"] for r in (one, two, three)] == [10.0, 11.0, 11.0]
    assert two["skipped"] is True and two["loss"] is None and two["gradient_norm"] is None
    assert set(one) == set(three) == {"step", "loss", "learning_rate", "tokens_per_second", "shrinking"}
    opened(tmp_path, step=3).write_step(4, metrics())
    assert read(tmp_path)[-1]["learning_rate"] == 1.5, "step - 1, where nobody counts"


def test_an_evaluation_that_is_not_finite_is_null_and_reads_back_as_nan(tmp_path):
    log = opened(tmp_path)
    log.write_evaluation(2, {"loss": math.nan, "acc": 0.5})
    assert read(tmp_path) == [{"step": 2, "validation": {"loss": None, "acc": 0.5}}]
    for same in (log, opened(tmp_path, step=2)):
        assert math.isnan(same.history.evaluations[2]["loss"]) and same.history.evaluations[2]["acc"] == 0.5


def test_each_pair_stops_once_also_across_a_resume(tmp_path):
    pair = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}
    (state,) = latches(stable_lora(1e-3).init({"one": pair, "two": pair}))
    shut = state._replace(shrinking={"one": jnp.zeros_like(state.shrinking["one"]), "two": state.shrinking["two"]})
    log = opened(tmp_path)
    for step, now in enumerate((state, shut, shut), 1):
        log.write_step(step, metrics(latches=[now]))
    opened(tmp_path, step=3).write_step(4, metrics(latches=[shut]))
    assert [r.get("stopped") for r in read(tmp_path)] == [None, ["one"], None, None]
    assert [r["shrinking"] for r in read(tmp_path)] == [2, 1, 1, 1]


def test_other_processes_read_the_same_and_write_nothing(tmp_path):
    log = opened(tmp_path)
    log.write_evaluation(0, {"loss": 1.0})
    log.write_step(1, metrics())
    log.write_evaluation(1, {"loss": 0.75})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = opened(tmp_path, writes=False, trackers=("tensorboard", "wandb"))
    assert other.history.evaluations == {0: {"loss": 1.0}}, "though the one that writes has not dropped the rest yet"
    other.write_data({"digest": "d"})
    other.write_step(2, {"loss": "is not even looked at"})
    other.write_evaluation(2, {"loss": 0.5})
    other.close()
    assert other.history.evaluations == {0: {"loss": 1.0}, 2: {"loss": 0.5}}, "both decide the same by them"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_memory_does_not_grow_with_the_steps(tmp_path):
    log = opened(tmp_path)
    one = metrics(**{f"number_{i}": 1.0 for i in range(20)})
    for step in range(1, 50):
        log.write_step(step, one)
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    for step in range(50, 1050):
        log.write_step(step, one)
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert grown < 50_000, "a thousand records are two megabytes"


def test_the_summary_reads_the_losses_from_the_file(tmp_path):
    log, config = opened(tmp_path), SimpleNamespace(select="last", steps=25, num_samples=2)
    log.write_data({"digest": "d"})
    log.write_evaluation(0, {"loss": math.inf})
    for step in range(1, 26):
        log.write_step(step, metrics(math.nan if step in (1, 20) else step))
    log.write_evaluation(25, {"loss": 0.25, "answers": [1]})
    summary = summarize(config, opened(tmp_path, step=25), 25, 25, 60.0)
    assert (summary["loss_first_10"], summary["data"]) == (np.mean(range(2, 11)), {"digest": "d"})
    assert summary["loss_last_10"] == np.mean([16, 17, 18, 19, 21, 22, 23, 24, 25])
    assert summary["before"] == {"loss": None} and summary["after"] == {"loss": 0.25}
    json.dumps(summary, allow_nan=False)
    assert list(summary_lines(config, log, [], summary))[-1].startswith("loss: 6.0000 (first 10 steps) -> 20.5556")


def test_ratios_are_recorded_often_at_first_and_then_less(tmp_path):
    log = opened(tmp_path)
    for step in (1, 199, 200, 205, 1990, 2010, 2100, 10**6, 10**6 + 1):
        ratios = {("model", "layers", "q_proj"): jnp.asarray([2.0000004, jnp.inf])}
        log.write_step(step, metrics(stop_ratios=ratios))
    records = read(tmp_path)
    assert [r["step"] for r in records if "stop_ratios" in r] == [1, 199, 200, 1990, 2100, 10**6]
    assert records[0]["stop_ratios"] == {"model.layers.0.q_proj": 2.0, "model.layers.1.q_proj": None}


def test_sample_answers_are_in_the_summary(tmp_path):
    log, config = opened(tmp_path), SimpleNamespace(select="last", steps=2, num_samples=2)
    questions = [Question(f"{i}?", (" a", " b"), 1, str(i)) for i in range(3)]
    for step, answers in ((0, [0, 0, 1]), (2, [1, 0, 0])):
        log.write_evaluation(step, {"acc": 0.5, "questions": 3, "answers": answers})
    summary = summarize(config, log, 2, 2, 1.0, questions)
    assert summary["samples"] == [
        {"prompt": "0?", "right": "b", "before": "a", "after": "b"},
        {"prompt": "2?", "right": "b", "before": "b", "after": "a"},
    ]
    said = list(summary_lines(config, log, questions, summary))
    assert said[0].endswith("after: b (right)") and "before: b (right)" in said[1] and "a (wrong)" in said[1]
    assert summarize(config, log, 2, 2, 1.0, questions[:2])["samples"] == [], "answers to other questions"
    assert summary["environment"]["python"] and summary["environment"]["jax"] == jax.__version__


@pytest.mark.parametrize("count", [0, 4, 15])
def test_the_summary_of_few_steps(tmp_path, count):
    log, config = opened(tmp_path), SimpleNamespace(select="last", steps=count, num_samples=0)
    for step in range(1, count + 1):
        log.write_step(step, metrics(step))
    summary = summarize(config, log, count, count, 1.0)
    found = [float(v) for v in range(1, count + 1)]
    assert summary["loss_first_10"] == (np.mean(found[:10]) if found else None)
    assert summary["loss_last_10"] == (np.mean(found[-10:]) if found else None)


FULL = """
    import sys
    from pathlib import Path
    from stablelora_jax import LoraSpec
    from stablelora_jax.runs.cli import exit_code
    from stablelora_jax.runs.log import open_log

    def work():
        log = open_log(Path(sys.argv[1]), 0, 9, lambda count: 0.1, LoraSpec(), trackers=TRACKERS)
        for step in range(1, 20_000):
            log.write_step(step, {"loss": 1.0, "tokens": 1, "latches": (), **{f"number_{i}": 0.1 for i in range(40)}})

    sys.exit(exit_code(work))
"""


@pytest.mark.parametrize("trackers,file", [((), "metrics.jsonl"), (("tensorboard",), "")])
def test_a_full_disk_ends_in_one_line_that_names_the_file(tmp_path, trackers, file):
    script = tmp_path / "full.py"
    script.write_text(textwrap.dedent(FULL).replace("TRACKERS", repr(trackers)))
    (tmp_path / "small").mkdir()
    inside = f"mount -t tmpfs -o size=1m tmpfs small || exit 77; {sys.executable} {script} small; code=$?"
    inside += "; cat small/metrics.jsonl > kept; exit $code"
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", inside],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin:/sbin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip("a small tmpfs cannot be mounted here")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"error: cannot write small/{file}") and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
    kept = (tmp_path / "kept").read_bytes().splitlines()
    assert len(kept) > 100 and [json.loads(line)["step"] for line in kept[:-1]] == list(range(1, len(kept)))


def test_a_bar_shows_loss_and_speed_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log = opened(tmp_path, step=7)
    log.write_step(8, metrics(0.25))
    log.write_step(9, metrics(0.125))
    log.progress.refresh()
    log.close()
    shown = capsys.readouterr().err
    assert "9/100" in shown and "loss=0.1250" in shown and "tokens_per_s=" in shown and "<" in shown
    monkeypatch.undo()
    opened(tmp_path).write_step(1, metrics())
    assert capsys.readouterr().err == ""
