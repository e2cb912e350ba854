"""The tasks measured on the package's own base: rows, means, files, and what is refused."""

import json
import math

import numpy as np
import pytest

from stablelora_jax import InputError, base_directory, load_pretrained
from stablelora_jax.evaluation.loglikelihood import encode
from stablelora_jax.evaluation.tasks import TaskResult, mean_stderr, measure, subject, table, write
from tests.data.tasks.test_arc import OURS
from tests.data.tasks.test_arc import write as write_rows
from tests.data.tasks.test_math import ROW
from tests.data.tasks.test_qa import SIQA


@pytest.fixture(scope="module")
def one():
    model, params = load_pretrained(base_directory())
    return subject(model, {"params": params}, batch_size=4)


@pytest.fixture
def data(tmp_path):
    twin = {**OURS, "choices": ["fire", "fire", "a sandy beach"], "label": 0}
    splits = {
        "arc_easy/validation": [OURS, twin, {**OURS, "label": 0}],
        "social_i_qa/validation": [SIQA],
        "gsm8k/test": [ROW],
        "text/validation": [{"text": "The cat is bigger than the ant.\nThe bear is big."}, {"text": "The cow " * 150}],
    }
    for name, rows in splits.items():
        (tmp_path / name).parent.mkdir()
        write_rows(tmp_path, rows, f"{name}.jsonl")
    return tmp_path


def test_choices(one, data):
    assert one.batch_size == 8, "rounded up to the devices"
    rows, summary = measure(one, "arc_easy", data)
    assert [row["index"] for row in rows] == [0, 1, 2] and rows[0]["target"] == 1
    assert rows[1]["loglikelihoods"][0] == rows[1]["loglikelihoods"][1], "identical choices score identically"
    for row, choices in zip(rows, (OURS["choices"], ["fire", "fire", "a sandy beach"], OURS["choices"]), strict=True):
        scores = np.array(row["loglikelihoods"])
        assert row["acc"] == float(scores.argmax() == row["target"])
        assert row["acc_norm"] == float((scores / [len(c) for c in choices]).argmax() == row["target"])
    acc = [row["acc"] for row in rows]
    assert summary["acc"] == np.mean(acc) and summary["rows"] == 3 and summary["split"] == "validation"
    assert summary["acc_stderr"] == pytest.approx(np.std(acc, ddof=1) / math.sqrt(3))
    assert measure(one, "arc_easy", data, limit=2).rows == rows[:2]
    rows, summary = measure(one, "social_i_qa", data)
    assert "acc" in rows[0] and "acc_norm" not in rows[0] and "acc_norm" not in summary
    assert summary["acc_stderr"] is None


def test_generation(one, data):
    with pytest.raises(InputError, match="max_new_tokens=256 leaves no room for a context in 256 positions"):
        measure(one, "gsm8k", data)
    rows, summary = measure(one, "gsm8k", data, max_new_tokens=20)
    (row,) = rows
    assert row["target"] == "1004" and summary["split"] == "test"
    assert set(row["exact_match"]) == set(row["extracted"]) == {"strict-match", "flexible-extract"}
    assert "Question:" not in row["generated"]
    assert summary["exact_match,strict-match"] == row["exact_match"]["strict-match"]


def test_text(one, data):
    rows, summary = measure(one, "text", data)
    tokenizer = one.model.tokenizer
    said = "The cat is bigger than the ant.\nThe bear is big."
    assert rows[0]["words"] == 11 and rows[0]["bytes"] == len(said)
    assert rows[0]["tokens"] == len(encode(tokenizer, said))
    total = sum(row["loglikelihood"] for row in rows)
    assert summary["byte_perplexity"] == pytest.approx(math.exp(-total / sum(row["bytes"] for row in rows)))
    assert summary["bits_per_byte"] == pytest.approx(math.log2(summary["byte_perplexity"]))
    assert summary["word_perplexity"] > summary["token_perplexity"] > 1


def test_mistakes(one, data):
    for task, arguments, message in [
        ("arc", {}, "no task 'arc'; the tasks are"),
        ("openbookqa", {}, "openbookqa does not exist; a directory with validation.jsonl is needed"),
        ("arc_easy", {"split": "test"}, "neither test.jsonl"),
        ("arc_easy", {"limit": 0}, "limit must be positive"),
    ]:
        with pytest.raises(InputError, match=message):
            measure(one, task, data, **arguments)
    with pytest.raises(InputError, match="batch_size must be positive"):
        subject(one.model, one.variables, batch_size=0)


def test_files_and_table(tmp_path):
    measured = {
        "arc_easy": TaskResult([{"index": 0, "acc": 1.0}], {"split": "test", "rows": 1, "acc": 1.0, "acc_stderr": None})
    }
    write(tmp_path / "out" / "here", measured, {"model": "m"})
    assert json.loads((tmp_path / "out/here/arc_easy.jsonl").read_text()) == {"index": 0, "acc": 1.0}
    summary = json.loads((tmp_path / "out/here/summary.json").read_text())
    assert summary == {"model": "m", "tasks": {"arc_easy": measured["arc_easy"].summary}}
    with pytest.raises(InputError, match="here exists already"):
        write(tmp_path / "out" / "here", measured, {})
    head, line = table(measured).splitlines()
    assert head.split() == ["task", "split", "rows", "metric", "value", "stderr"]
    assert line.split() == ["arc_easy", "test", "1", "acc", "1.0000", "-"]


def test_standard_error():
    assert mean_stderr([1.0]) is None
    assert mean_stderr([1.0, 0.0, 0.0, 1.0]) == pytest.approx(math.sqrt(1 / 3 / 4))
