"""Rows of one's own, in three kinds, columns by any name; and plain text."""

import gzip
import json
from dataclasses import replace

import pytest

from stablelora_jax import InputError
from stablelora_jax.config.run import JsonlTask
from stablelora_jax.data.tasks import jsonl, load_questions, rows, schemas, text
from tests.data.tasks.test_arc import write


def load(directory, given, **task):
    write(directory, given)
    return load_questions(JsonlTask(path=str(directory), **task), "train")


def test_choice(tmp_path):
    row = {"q": "Wet is", "choices": ["fire", "water"], "right": 1, "key": 7}
    fields = {"prompt": "q", "label": "right", "id": "key"}
    assert load(tmp_path, [row], kind="choice", fields=fields) == [("Wet is", (" fire", " water"), 1, "7")]


def test_completion(tmp_path):
    three = [
        {"prompt": "One", "completion": "two"},
        {"prompt": "One\n", "completion": "two", "target": 2},
        {"prompt": "One", "completion": "\ntwo", "id": "c"},
    ]
    found = load(tmp_path, three)
    assert found == [
        ("One", " two", None, "train-0"),
        ("One", "\ntwo", "2", "train-1"),
        ("One", "\ntwo", None, "c"),
    ]
    task = JsonlTask(path=str(tmp_path), train_limit=2)
    assert load_questions(task, "train") == found[:2]


def test_chat(tmp_path):
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    two = [{"messages": turns}, {"messages": turns[1:]}]
    assert [p[:3] for p in load(tmp_path, two, kind="chat")] == [
        ("SYSTEM\n\nUSER", " ASSISTANT", None),
        ("USER", " ASSISTANT", None),
    ]
    assert [p.messages for p in load(tmp_path, two, kind="chat")] == [tuple(turns), tuple(turns[1:])]
    several = {"messages": [*turns, *turns[1:], turns[1]], "tools": [{"type": "function"}]}
    (found,) = load(tmp_path, [several], kind="chat")
    assert found[:2] == ("SYSTEM\n\nUSER\n\nASSISTANT\n\nUSER", " ASSISTANT")
    assert (found.messages, found.tools) == (tuple(several["messages"]), several["tools"])
    for wrong, message in (
        ("x", "a chat is a list of messages"),
        ([{"speaker": "human", "value": "x"}], "message 1 is .*: a message is"),
        (turns[:2], "no message of the assistant"),
        ([turns[1], {"role": "assistant", "content": [1]}], "a content that holds int, not text"),
    ):
        with pytest.raises(InputError, match=f"row 2: .*{message}"):
            load(tmp_path, [two[0], {"messages": wrong}], kind="chat")


@pytest.mark.parametrize(
    "task,message",
    [
        ({"fields": {"promt": "q"}}, "task.fields.promt is not read for kind completion"),
        ({"fields": {"prompt": "q"}}, "row 1: there is no column 'q'; the columns are prompt, completion"),
        ({"kind": "choice"}, r"there is no column 'choices'.*are columns of task.kind=completion \(here: choice\)"),
        ({"kind": "choice", "fields": {"prompt": "q"}}, "task.fields={prompt: COLUMN, choices: COLUMN, label: COLUMN}"),
        ({"fields": {"completion": "prompt", "prompt": "q"}}, "task.fields={completion: prompt, prompt: COLUMN}"),
        ({"hub": "some/thing"}, "either task.path or task.hub"),
    ],
)
def test_mistakes(tmp_path, task, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, [{"prompt": "One", "completion": "two"}], **task)


@pytest.mark.parametrize(
    "kind,row,fields",
    [
        (
            "completion",
            {"instruction": "x", "input": "", "response": "y"},
            "{prompt: instruction, completion: response}",
        ),
        ("completion", {"question": "x", "answer": "y"}, "{prompt: question, completion: answer}"),
        ("completion", {"prompt": "x", "response": "y"}, "{completion: response}"),
        ("chat", {"dialog": []}, "{messages: dialog}"),
        ("text", {"content": "x"}, "{text: content}"),
        ("choice", {"question": "x", "options": [], "gold": 0}, "{prompt: question, choices: options, label: gold}"),
    ],
)
def test_columns_of_another_name_are_named_with_the_way_out(tmp_path, kind, row, fields):
    with pytest.raises(InputError) as error:
        load(tmp_path, [row], kind=kind)
    assert f"task.fields={fields}" in str(error.value) and "damaged" not in str(error.value)


TALK = [{"from": "human", "value": "One"}, {"from": "gpt", "value": "two"}]
MESSAGES = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "two"}]
TOLD = ("One", " two", None, "train-0")
SCHEMAS = {
    "messages": ({"messages": MESSAGES}, "chat", "OpenAI's messages", (*TOLD, tuple(MESSAGES), None)),
    "conversations": ({"conversations": TALK}, "chat", "ShareGPT's", (*TOLD, tuple(MESSAGES), None)),
    "conversations of roles": ({"conversations": MESSAGES}, "chat", "ShareGPT's", (*TOLD, tuple(MESSAGES), None)),
    "Alpaca": ({"instruction": "One", "input": "", "output": "two"}, "completion", "Alpaca's", TOLD),
    "prompt": ({"prompt": "One", "completion": "two", "text": "x"}, "completion", "prompt and completion", TOLD),
    "preference": (
        {"prompt": "One", "chosen": "a", "rejected": "b"},
        "preference",
        "preferences",
        ("One", (" a", " b"), 0, "train-0"),
    ),
    "text": ({"text": "One two"}, "text", "text alone", ("", "One two", None, "train-0")),
    "choice": (
        {"prompt": "One", "choices": ["a", "b"], "label": 1},
        "choice",
        "mult",
        ("One", (" a", " b"), 1, "train-0"),
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_recognised_and_said(tmp_path, name):
    row, kind, said, item = SCHEMAS[name]
    assert load(tmp_path, [row], kind="auto") == load(tmp_path, [row], kind=kind) == [item]
    lines = []
    task = JsonlTask(path=str(tmp_path), kind="auto")
    assert schemas.recognised(task, lines.append) == replace(task, kind=kind)
    (line,) = lines
    assert line.startswith(f"{tmp_path / 'train.jsonl'}: rows of {said}") and line.endswith(f"(task.kind={kind})")
    assert schemas.recognised(replace(task, kind="text"), lines.append).kind == "text" and len(lines) == 1


def test_what_others_have_besides(tmp_path):
    (found,) = load(tmp_path, [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert found.prompt == "Add.\n\n1 2"
    row = {"conversations": TALK, "system": "Be brief.", "tools": '[{"name": "f"}]'}
    (found,) = load(tmp_path, [row], kind="chat")
    assert found.messages == ({"role": "system", "content": "Be brief."}, *MESSAGES) and found.tools == [{"name": "f"}]
    (found,) = load(tmp_path, [{"talk": TALK}], kind="chat", fields={"messages": "talk"})
    assert found.messages == tuple(MESSAGES)
    with pytest.raises(InputError, match="row 1 has the columns chosen, which task.kind=auto does not know"):
        load(tmp_path, [{"chosen": "x"}], kind="auto")


ROWS = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(3)]
LINES = [json.dumps(row) for row in ROWS]
FORMS = {
    "lines": "\n".join(LINES),
    "a last line break": "\n".join(LINES) + "\n",
    "Windows": "\r\n".join(LINES) + "\r\n",
    "blank lines": "\n\n" + "\n\n  \n".join(LINES) + "\n\n\n",
    "a byte-order mark": "\ufeff" + "\n".join(LINES),
    "an array": json.dumps(ROWS),
    "an array over lines": json.dumps(ROWS, indent=2) + "\n",
    "an array behind a mark": "\ufeff\n " + json.dumps(ROWS, indent=1),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_datasets_reads(tmp_path, form, packed):
    content = FORMS[form].encode()
    (tmp_path / f"train.jsonl{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)
    found = load_questions(JsonlTask(path=str(tmp_path)), "train")
    assert [(p.prompt, p.answer) for p in found] == [(f"q {i}", f" a {i}") for i in range(3)]


def test_datasets_reads_the_same(tmp_path):
    import datasets

    for number, form in enumerate(("lines", "blank lines", "an array", "an array over lines")):
        (tmp_path / f"{number}.jsonl").write_text(FORMS[form])
        there = datasets.load_dataset(
            "json", data_files=str(tmp_path / f"{number}.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert [dict(row) for row in there] == rows.file_rows(tmp_path / f"{number}.jsonl")[1] == ROWS


BAD = {
    "a line cut": (LINES[0] + "\n" + LINES[1][:9], "line 2 is not JSON"),
    "brackets": ("[" * 100_000, "neither an object a line nor one JSON array"),
    "brackets in a row": ('{"prompt": ' + "[" * 100_000, "line 1 is not JSON"),
    "brackets that close": ('{"prompt": ' + "[" * 900 + "]" * 900 + ', "completion": "x"}', "row 1 is damaged"),
    "an array of numbers": ("[1, 2]", "row 1 is damaged .it is int, not an object"),
    "text": ('"x"', "row 1 is damaged .it is str"),
    "nothing": ("\n \n", "has no rows"),
    "half a surrogate pair": ('{"prompt": "\\ud800", "completion": "x"}', "row 1 is damaged .UnicodeEncodeError"),
    "bytes": (b"\xff\xfe{", "line 1 is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_row_is_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "train.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        load_questions(JsonlTask(path=str(tmp_path)), "train")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_LINE", 1 << 20)
    bombs = {
        "a line": (
            gzip.compress(b'{"prompt":"' + b"a" * (4 << 20)),
            "a line is longer than 1 MiB: put one row on a line",
        ),
        "many lines": (gzip.compress((LINES[0] + "\n").encode() * 200_000), "unpacks to more than 200 times its size"),
        "cut": (gzip.compress(FORMS["lines"].encode())[:-9], "cannot be unpacked"),
        "no gzip": (b"hello", "line 1 cannot be unpacked"),
    }
    for content, message in bombs.values():
        (tmp_path / "train.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_questions(JsonlTask(path=str(tmp_path)), "train")
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt":"' + b"a" * (2 << 20))
    with pytest.raises(InputError, match="a line is longer than 1 MiB"):
        load_questions(JsonlTask(path=str(tmp_path)), "train")


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
