"""OpenBookQA, Social IQa, HellaSwag and all five merged: both layouts, real rows, labels."""

import json

import pytest

from stablelora_jax import InputError
from stablelora_jax.config.run import ArcTask, QaTask
from stablelora_jax.data.tasks import hellaswag, load_questions, merged_qa, openbookqa, social_i_qa
from tests.data.tasks.test_arc import OURS, write

STEM = {
    "question_stem": "Wet is",
    "choices": {"text": ["fire", "water"], "label": ["A", "B"]},
    "answerKey": " B",
    "id": "o",
}
SIQA = {"context": "Al ran.", "question": "Why?", "answerA": "late", "answerB": "fun", "answerC": "no", "label": "3"}
SWAG = {
    "activity_label": "Baking",
    "ctx_a": "[header] A man [title] bakes  bread.",
    "ctx_b": "he THEN",
    "endings": ["eats it", " sleeps [step] long ", "runs"],
    "label": "2",
}


def test_openbookqa():
    expected = ("Wet is", (" fire", " water"), 1, "o")
    assert openbookqa.question(STEM, "o") == expected
    assert openbookqa.question({"question": "Wet is", "choices": ["fire", "water"], "label": 1}, "o") == expected


def test_social_i_qa():
    expected = ("Q: Al ran. Why?\nA:", (" late", " fun", " no"), 2, "s")
    assert social_i_qa.question(SIQA, "s") == expected
    ours = {"context": "Al ran.", "question": "Why?", "choices": ["late", "fun", "no"], "label": 2}
    assert social_i_qa.question(ours, "s") == expected
    assert [social_i_qa.question({**SIQA, "label": label}, "s").label for label in "123"] == [0, 1, 2]
    for wrong in ("0", "4", "x"):
        with pytest.raises(ValueError):
            social_i_qa.question({**SIQA, "label": wrong}, "s")


def test_hellaswag():
    prompt, choices, label, _ = hellaswag.question(SWAG, "h")
    assert prompt == "Baking: A man. bakes bread. He then"
    assert choices == (" eats it", " sleeps long", " runs") and label == 2
    ours = {"activity_label": "Baking", "context": "A man bakes. he", "choices": ["a", "b"], "label": 0}
    assert hellaswag.question(ours, "h")[:3] == ("Baking: A man bakes. he", (" a", " b"), 0)


def test_an_unlabelled_split_is_refused(tmp_path):
    write(tmp_path, [{**SWAG, "label": ""}], "test.jsonl")
    with pytest.raises(InputError, match="test.jsonl: row 1.*no label.*unlabelled"):
        hellaswag.questions("test", str(tmp_path))


def lines(path):
    return [json.loads(line) for line in path.read_text().strip().split("\n")]


@pytest.mark.parametrize(
    "module,local,name",
    [
        (openbookqa, "openbookqa/validation.jsonl", "openbookqa__main__validation.jsonl"),
        (openbookqa, "openbookqa/test.jsonl", "openbookqa__main__test.jsonl"),
        (social_i_qa, "social_i_qa/validation.jsonl", "social_i_qa__validation.jsonl"),
    ],
)
def test_real_rows_of_the_hub_and_normalised_ones_agree(shared, module, local, name):
    hub = [module.question(row, "") for row in lines(shared(f"data/hf_schema/{name}"))]
    ours = [module.question(row, "") for row in lines(shared(f"data/{local}"))]
    assert hub and hub == ours[: len(hub)]


@pytest.mark.parametrize(
    "name,hub,file",
    [
        ("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), "ai2_arc__ARC-Easy__validation.jsonl"),
        ("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), "ai2_arc__ARC-Challenge__validation.jsonl"),
        ("openbookqa", ("allenai/openbookqa", "main"), "openbookqa__main__validation.jsonl"),
        ("social_i_qa", ("lighteval/siqa", None), "social_i_qa__validation.jsonl"),
    ],
)
def test_the_hub_through_datasets(shared, monkeypatch, name, hub, file):
    datasets = pytest.importorskip("datasets")
    rows = lines(shared(f"data/hf_schema/{file}"))
    asked = []

    def load_dataset(repository, config, split):
        asked.append((repository, config, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = merged_qa.part_questions(name, "validation", None)
    assert asked == [(*hub, "validation")]
    local = merged_qa.part_questions(name, "validation", str(shared(f"data/{name}")))
    assert [q[:3] for q in found] == [q[:3] for q in local[: len(rows)]]


@pytest.mark.parametrize(
    "name,split,count",
    [
        ("openbookqa", "train", 4957),
        ("social_i_qa", "validation", 1954),
        ("hellaswag", "validation", 10042),
    ],
)
def test_real_splits(shared, name, split, count):
    questions = load_questions(QaTask(name=name, path=str(shared(f"data/{name}"))), split)
    assert len(questions) == count
    assert {q.label for q in questions} == set(range(len(questions[0].choices)))
    for q in questions:
        assert q.prompt == q.prompt.rstrip() and all(c[0] == " " and c[1:] == c.strip() for c in q.choices)


def test_merged(tmp_path, shared):
    rows = {"arc_easy": OURS, "arc_challenge": OURS, "openbookqa": STEM, "social_i_qa": SIQA, "hellaswag": SWAG}
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, [row], "train.jsonl")
    task = QaTask(name="merged_qa", path=str(tmp_path))
    found = load_questions(task, "train")
    assert [q.id for q in found] == [
        "hellaswag-train-0",
        "social_i_qa-train-0",
        "openbookqa-o",
        "arc_easy-a",
        "arc_challenge-a",
    ]
    assert found == load_questions(task, "train")
    parts = [merged_qa.part_questions(name, "train", str(tmp_path / name)) for name in merged_qa.PARTS]
    assert [q[:3] for q in found] == [q[:3] for part in parts for q in part]
    assert load_questions(ArcTask(path=str(tmp_path / "arc_easy")), "train") == parts[3]
    data = str(shared("data"))
    assert len(merged_qa.questions("validation", data)) == 10042 + 1954 + 500 + 570 + 299
    with pytest.raises(InputError, match="not complete without hellaswag .*neither train.jsonl") as error:
        merged_qa.questions("train", data)
    assert "openbookqa" not in str(error.value)
