"""Every kind of bad row among good ones is one line with its number, before anything is written."""

import json

import pytest

from stablelora_jax import InputError
from stablelora_jax.config.run import JsonlTask
from stablelora_jax.data import template, tokenize_dataset, training_texts
from stablelora_jax.data.tasks import load_questions
from tests.data.chats import CHATS, answered, calls, said, turns, user
from tests.data.test_chat import BAD, CALLS, PLAIN, THINKING, byte_tokenizer

GOOD = {
    "chat": {"messages": turns(1)},
    "completion": {"prompt": "One", "completion": "two"},
    "text": {"text": "One"},
    "choice": {"prompt": "One", "choices": ["two", "three"], "label": 0},
}
NO_JSON = ("no JSON", "half a surrogate")  # no line of a file can hold them
WRONG = {
    **{
        name: ("chat", {"messages": own[0], "tools": own[1]}, own[2])
        for name, own in BAD.items()
        if name not in NO_JSON
    },
    "no object": ("chat", [1], "it is list, not an object"),
    "null": ("chat", None, "it is NoneType, not an object"),
    "another schema": ("chat", {"prompt": "x", "completion": "y"}, "columns of task.kind=completion .here: chat"),
    "a chat as a completion": ("completion", {"messages": turns(1)}, "columns of task.kind=chat .here: completion"),
    "no column": ("chat", {"messsages": turns(1)}, "there is no column 'messages'"),
    "messages of nothing": ("chat", {"messages": None}, "a chat is a list of messages"),
    "messages as JSON": ("chat", {"messages": json.dumps(turns(1))}, "a chat is a list of messages"),
    "a speaker": ("chat", {"conversations": [{"from": "moon", "value": "x"}]}, "message 1 is from 'moon', which is"),
    "no speaker": ("chat", {"conversations": [{"value": "x"}]}, "message 1 is .*a message is"),
    "tools that are no JSON": ("chat", {"messages": turns(1), "tools": "["}, "tools is .*, which is no JSON"),
    "an empty prompt": ("completion", {"prompt": " ", "completion": "x"}, "prompt is ' ': a string that is not empty"),
    "an empty completion": ("completion", {"prompt": "x", "completion": ""}, "completion is ''"),
    "a number as completion": ("completion", {"prompt": "x", "completion": 7}, "completion is 7"),
    "an empty output": ("completion", {"instruction": "x", "input": "", "output": ""}, "completion is ''"),
    "a number as input": (
        "completion",
        {"instruction": "x", "input": 3, "output": "y"},
        "instruction or input is no str",
    ),
    "empty text": ("text", {"text": "\n"}, "text is"),
    "a label beyond": ("choice", {"prompt": "x", "choices": ["a", "b"], "label": 2}, "label"),
    "an empty choice": ("choice", {"prompt": "x", "choices": ["a", ""], "label": 0}, "a choice is empty"),
}
RAISES = "{% if 'Bad' in messages[0].content %}{{ raise_exception('not that') }}{% endif %}" + PLAIN
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = "{% if 'Bad' in messages[0].content %}" + LOOPS + "{% endif %}" + PLAIN
CRASHES = "{% if 'Bad' in messages[0].content %}{{ messages[9].content }}{% endif %}" + PLAIN
SHOUT = [{"role": "user", "content": "Bad"}, said(0)]
TEMPLATES = {
    "a template that raises": (RAISES, SHOUT, "the chat template does not take it .TemplateError: not that"),
    "a template that fails": (CRASHES, SHOUT, "the chat template does not take it .UndefinedError"),
    "an endless loop": (
        ENDLESS,
        SHOUT,
        "the chat template does not take it .it takes more than 5 seconds, or too much",
    ),
    "dropped tool calls": (PLAIN.replace(CALLS, ""), [user(0), calls(0)], "does not write the tool calls"),
    "dropped reasoning": (PLAIN, CHATS["reasoning"][0], "does not write the reasoning"),
    "dropped thinking": (THINKING, CHATS["reasoning in two turns"][0], "does not keep the text up to message 2"),
    "a list as it is": (
        PLAIN,
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}, said(0)],
        "writes the list",
    ),
    "too long": (PLAIN, [{"role": "user", "content": "x" * 999}, said(0)], "has 10.. tokens, more than max_length=900"),
    "a user's word too many": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
        "{% endif %}" + PLAIN.removeprefix("{% for m in messages %}"),
        [user(0), calls(0), answered(1), said(0)],
        "TemplateError: alternate",
    ),
}


def test_there_are_enough():
    assert len(WRONG) + len(TEMPLATES) >= 40


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_cannot_be_read_is_named(tmp_path, name):
    kind, row, message = WRONG[name]
    lines = [GOOD[kind], GOOD[kind], row, GOOD[kind]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=f"^{tmp_path / 'train.jsonl'}: row 3.*{message}") as error:
        load_questions(JsonlTask(path=str(tmp_path), kind=kind), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_that_the_template_does_not_take_is_named(tmp_path, monkeypatch, name):
    if name == "an endless loop":
        quick = template.WORKER.read_text().replace("SECONDS = 5.0", "SECONDS = 1.5")
        (tmp_path / "worker.py").write_text(quick)
        template._end_all()
        monkeypatch.setattr(template, "WORKER", tmp_path / "worker.py")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, messages, message = TEMPLATES[name]
    lines = [GOOD["chat"], GOOD["chat"], {"messages": messages}, GOOD["chat"]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = training_texts(load_questions(JsonlTask(path=str(tmp_path), kind="chat"), "train"))
    how = dict(max_length=900, truncate="error", chat=True, cache=tmp_path / "cache")
    with pytest.raises(InputError, match=rf"^row 3 \(train-2\).*{message}") as error:
        tokenize_dataset(tokenizer, texts, **how)
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("*"))
    if name == "an endless loop":
        template._end_all()
