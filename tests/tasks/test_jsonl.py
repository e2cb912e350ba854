"""Rows of one's own, in three kinds, columns by any name; and plain text."""

import pytest

from stablelora_jax import InputError
from stablelora_jax.run_config import JsonlTask
from stablelora_jax.tasks import jsonl, load_questions, text
from tests.tasks.test_arc import write


def load(directory, rows, **task):
    write(directory, rows)
    return load_questions(JsonlTask(path=str(directory), **task), "train")


def test_choice(tmp_path):
    row = {"q": "Wet is", "choices": ["fire", "water"], "right": 1, "key": 7}
    fields = {"prompt": "q", "label": "right", "id": "key"}
    assert load(tmp_path, [row], kind="choice", fields=fields) == [("Wet is", (" fire", " water"), 1, "7")]


def test_completion(tmp_path):
    rows = [
        {"prompt": "One", "completion": "two"},
        {"prompt": "One\n", "completion": "two", "target": 2},
        {"prompt": "One", "completion": "\ntwo", "id": "c"},
    ]
    found = load(tmp_path, rows)
    assert found == [
        ("One", " two", None, "train-0"),
        ("One", "\ntwo", "2", "train-1"),
        ("One", "\ntwo", None, "c"),
    ]
    task = JsonlTask(path=str(tmp_path), train_limit=2)
    assert load_questions(task, "train") == found[:2]


def test_chat(tmp_path):
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    rows = [{"messages": turns}, {"messages": turns[1:]}]
    assert [p[:3] for p in load(tmp_path, rows, kind="chat")] == [
        ("SYSTEM\n\nUSER", " ASSISTANT", None),
        ("USER", " ASSISTANT", None),
    ]
    for wrong in (turns[:2], turns[1:] * 2, [], [{"role": "user"}, turns[2]]):
        with pytest.raises(InputError, match="row 1 is damaged"):
            load(tmp_path, [{"messages": wrong}], kind="chat")


@pytest.mark.parametrize(
    "task,message",
    [
        ({"fields": {"promt": "q"}}, "task.fields.promt is not read for kind completion"),
        ({"fields": {"prompt": "q"}}, "row 1 is damaged.*no column 'q'; the columns are prompt, completion"),
        ({"kind": "choice"}, "row 1 is damaged.*choices"),
        ({"hub": "some/thing"}, "either task.path or task.hub"),
    ],
)
def test_mistakes(tmp_path, task, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, [{"prompt": "One", "completion": "two"}], **task)


def test_the_hub_offline_is_one_line():
    with pytest.raises(InputError, match="no/such train could not be had") as error:
        jsonl.items("completion", "train", None, "no/such", None, {})
    assert "\n" not in str(error.value)


def test_text(tmp_path):
    write(tmp_path, [{"text": "a b"}, {"text": "c\n"}], "validation.jsonl")
    assert text.texts("validation", str(tmp_path)) == ["a b", "c\n"]
    write(tmp_path, [{"text": " "}], "validation.jsonl")
    with pytest.raises(InputError, match="row 1"):
        text.texts("validation", str(tmp_path))
    with pytest.raises(InputError, match="local directory"):
        text.texts("validation", None)
