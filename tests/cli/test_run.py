"""A run by the command, and what the other commands do with it."""

import json
import os
import shutil

import pytest

from stablelora_jax import base_directory
from stablelora_jax.cli.main import main
from stablelora_jax.runs.records import each_record

ROWS = [
    {"q": f"The {a} is", "a": f"{b} than the ant."}
    for a in ("cat", "bear", "horse", "lion", "cow", "snail")
    for b in ("bigger", "smaller")
]
FIELDS = "{prompt: q, completion: a}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with rows of one's own and a run on them, which the tests read."""
    place = tmp_path_factory.mktemp("made")
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    for split in ("train", "validation"):
        (place / f"{split}.jsonl").write_text(text)
    assert main(["train", *words_of(place)]) == 0
    return place


def words_of(place):
    task = f"task={{name: jsonl, path: '{place}', fields: {FIELDS}}}"
    size = ["steps=2", "schedule.warmup_steps=0", "batch_size=8", "max_length=32", "trackers=[]"]
    return [task, *size, f"output={place / 'run'}"]


def test_rows_of_ones_own_are_measured_as_in_the_run(stablelora, made, tmp_path):
    (before, after) = [r["validation"]["loss"] for r in each_record(made / "run/metrics.jsonl") if "validation" in r]
    common = ["--tasks", "jsonl", "--data", made, "--fields", FIELDS, "--batch-size", 8]
    for adapter, expected in (([], before), (["--adapter", made / "run"], after)):
        out = tmp_path / str(len(adapter))
        code, said, err = stablelora("evaluate", base_directory(), *adapter, *common, "--output", out)
        assert (code, err) == (0, "") and [line.split()[3] for line in said.splitlines()[1:]] == [
            "loss",
            "token_perplexity",
        ]
        summary = json.loads((out / "summary.json").read_text())["tasks"]["jsonl"]
        assert summary["loss"] == pytest.approx(expected, abs=2e-6) and summary["rows"] == len(ROWS)
    assert abs(before - after) > 1e-3
    code, said, _ = stablelora("evaluate", base_directory(), *common, "--split", "train", "--limit", 3)
    assert code == 0 and said.splitlines()[1].split()[:3] == ["jsonl", "train", "3"]


def test_the_run_is_drawn_exported_and_used(stablelora, made):
    run = made / "run"
    os.remove(run / "loss.png")
    code, out, err = stablelora("report", run)
    assert (code, err) == (0, "") and (run / "loss.png").is_file() and str(run / "loss.png") in out
    code, out, err = stablelora("report", run, "--html")
    assert (code, out, err) == (0, f"{run / 'report.html'}\n", "") and (run / "report.html").stat().st_size > 5000
    code, out, err = stablelora("report", run, run, "--html", "--output", made / "both.html")
    assert (code, out, err) == (0, f"{made / 'both.html'}\n", "")
    code, out, err = stablelora("export", run, "--to", "peft", "--output", made / "exported")
    assert (code, err) == (0, "") and (made / "exported" / "adapter_config.json").is_file()
    words = ["--adapter", made / "exported", "--prompt", "The bear is", "--max-new-tokens", 4]
    code, out, err = stablelora("generate", base_directory(), *words)
    assert (code, err) == (0, "") and out.startswith("The bear is")
    assert stablelora("generate", *words) == (0, out, ""), "the base that the adapter names"
    code, out, err = stablelora("generate", run, "--prompt", "x")
    assert (code, err) == (2, f"error: {run} is an adapter, not a model: give it with --adapter {run}\n")
    code, out, err = stablelora("generate", "--prompt", "x")
    assert (code, err) == (2, "error: name a MODEL, or with --adapter an adapter that names its base\n")


def test_a_finished_run_notices_that_its_rows_have_changed(stablelora, made, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(made, place)
    moved = words_of(made)[:-1]
    again = [*moved, f"output={place / 'run'}"]
    code, out, err = stablelora("train", *again)
    assert (code, err) == (0, "") and "is finished" in out
    (made / "train.jsonl").write_text((made / "train.jsonl").read_text().replace("bear", "wolf"))
    try:
        code, _, err = stablelora("train", *again)
        assert code == 2 and f"the training data in {made} have changed since" in err and err.count("\n") == 1
    finally:
        shutil.copy(place / "train.jsonl", made / "train.jsonl")
    code, _, err = stablelora("train", *again, "seed=1", "accept_changes=true")
    assert code == 2 and "has done all 2 steps, none is left for what has changed" in err
    assert (place / "run/config.yaml").read_bytes() == (made / "run/config.yaml").read_bytes()


def test_data_shows_rows_as_tokens(stablelora, made):
    words = [f"task={{name: jsonl, path: '{made}', fields: {FIELDS}}}", "max_length=8", "batch_size=4"]
    code, out, err = stablelora("data", "--samples", 1, *words)
    lines = out.splitlines()
    assert (code, err) == (0, "") and lines.count(" cat is[ bigger than the ant.</s>]") == 2
    assert [line.split(";")[-1] for line in lines if "rows; " in line] == [" 12 rows truncated to max_length=8"] * 2


def test_data_loads_no_weights(stablelora, made, monkeypatch):
    from stablelora_jax.models.pretrained import load

    monkeypatch.setattr(load, "load_params", None)
    code, out, err = stablelora("data", "--config", "default", "--samples", 0, "evaluate=false", "task.train_limit=64")
    assert (code, err) == (0, "") and out.startswith("64 texts in 64 rows: 1728 tokens, 128 of them loss tokens; ")
    assert out.endswith(
        "train: 64 rows; min / median / max: tokens 27 / 27 / 27, loss tokens 2 / 2 / 2; "
        "0 rows truncated to max_length=128\n"
    )
