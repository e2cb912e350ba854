"""ARC rows from a directory, in both layouts, and damaged ones."""

import gzip
import json

import pytest

from stablelora_jax import InputError
from stablelora_jax.config.run import ArcTask
from stablelora_jax.data.tasks import arc, load_questions

OURS = {"id": "a", "question": "What is wet?", "choices": ["fire", "water", "sand"], "label": 1}
HUB = {
    "id": "b",
    "question": "What is hot?",
    "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
    "answerKey": "2",
}


def write(directory, rows, name="train.jsonl"):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(directory / name, "wt") as file:
        file.write(text)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_both_layouts(tmp_path, name):
    write(tmp_path, [OURS, HUB], name)
    first, second = arc.questions("arc_easy", "train", str(tmp_path))
    assert first == ("Question: What is wet?\nAnswer:", (" fire", " water", " sand"), 1, "a")
    assert second == ("Question: What is hot?\nAnswer:", (" ice", " fire"), 1, "b")
    assert len(load_questions(ArcTask(path=str(tmp_path), train_limit=1), "train")) == 1


@pytest.mark.parametrize(
    "row,message",
    [
        ({**OURS, "label": 3}, "row 2 is damaged.*label 3 for 3 choices"),
        ({**OURS, "label": -1}, "row 2"),
        ({**OURS, "label": "1"}, "row 2"),
        ({**OURS, "question": ""}, "row 2.*question is '': a string that is not empty is needed"),
        ({**OURS, "choices": ["a", None]}, "row 2"),
        ({**HUB, "answerKey": "9"}, "row 2"),
        ({"question": "x"}, "row 2.*choices"),
        ({**HUB, "answerKey": ""}, "row 2.*no answerKey.*unlabelled"),
        ({**OURS, "label": None}, "row 2.*no label.*unlabelled"),
        ([1, 2], "row 2"),
        ("{not json", "line 2 is not JSON"),
    ],
)
def test_damaged_rows_are_numbered(tmp_path, row, message):
    write(tmp_path, [OURS, row])
    with pytest.raises(InputError, match=message) as error:
        arc.questions("arc_easy", "train", str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_and_empty_splits(tmp_path):
    with pytest.raises(InputError, match="has neither train.jsonl nor train.jsonl.gz"):
        arc.questions("arc_easy", "train", str(tmp_path))
    write(tmp_path, [])
    with pytest.raises(InputError, match="has no rows"):
        arc.questions("arc_easy", "train", str(tmp_path))
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match="train.jsonl.gz: line 1"):
        arc.questions("arc_easy", "train", str(tmp_path))


def test_real_rows(shared):
    assert len(arc.questions("arc_easy", "validation", str(shared("data/arc_easy")))) == 570
    assert len(arc.questions("arc_challenge", "train", str(shared("data/arc_challenge")))) == 1119
    rows = shared("data/hf_schema/ai2_arc__ARC-Easy__validation.jsonl").read_text().splitlines()
    hub = [arc.question(json.loads(row), "") for row in rows]
    local = arc.questions("arc_easy", "validation", str(shared("data/arc_easy")))
    assert [q[:3] for q in hub] == [q[:3] for q in local]
    labels = {tuple(json.loads(row)["choices"]["label"]) for row in rows}
    assert labels == {tuple("ABCD"), tuple("1234"), tuple("ABCDE"), tuple("ABC")}


def test_the_hub_offline_is_one_line():
    with pytest.raises(InputError, match="task.path") as error:
        arc.questions("arc_easy", "train")
    assert "\n" not in str(error.value)
