"""What ``stablelora data`` shows: the rows as the model will see them, with exactly the loss tokens marked."""

import json
import os

import pytest

from stablelora_jax import InputError, base_directory
from stablelora_jax.cli.data import with_path
from stablelora_jax.cli.main import main
from stablelora_jax.data import Example
from stablelora_jax.models.pretrained.tokenizer import load_tokenizer
from stablelora_jax.runs.data_summary import GREEN, marked

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The base with a chat template."""
    place = tmp_path_factory.mktemp("chatty")
    for file in base_directory().iterdir():
        os.symlink(file, place / file.name)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place


def test_each_run_of_loss_tokens_is_marked():
    tokenizer = load_tokenizer(base_directory())
    ids = tokenizer("The cat is bigger than the ant.", add_special_tokens=False).input_ids
    mask = [0, 1, 1, 0, 1, *[0] * (len(ids) - 6), 1]
    whole = marked(tokenizer, Example(ids, 1, mask=mask), ("[", "]"))
    assert whole.replace("[", "").replace("]", "") == tokenizer.decode(ids) and whole.count("[") == 3
    assert marked(tokenizer, Example(ids, 2)).count("[") == 1 and "[" not in marked(tokenizer, Example(ids, len(ids)))
    assert marked(tokenizer, Example(ids, 2), GREEN).count("\x1b[1;32m") == 1


def test_a_directory_of_chats(chatty, tmp_path, capsys):
    talk = [("human", "Which is big?"), ("gpt", "The bear."), ("human", "And small?"), ("gpt", "The ant.")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in talk]}
    rows = [row, row, {"conversations": row["conversations"][:2]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (tmp_path, tmp_path / "train.jsonl"):
        assert main(["data", str(path), "--show", "1", f"model.path={chatty}"]) == 0
        out = capsys.readouterr().out
        assert "rows of ShareGPT's conversations" in out and out.count("row 1, loss tokens") == 1
        assert "<user>Which is big?</s><assistant>[The bear.</s>]<user>And small?</s><assistant>[The ant.</s>]" in out
    assert main(["data", str(tmp_path), "--show", "1", f"model.path={chatty}", "data.loss_on=last"]) == 0
    assert "<assistant>The bear.</s><user>And small?</s><assistant>[The ant.</s>]" in capsys.readouterr().out
    assert main(["data", str(tmp_path), f"model.path={chatty}", "max_length=25"]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 training texts are longer than max_length=25" in said
    assert "2 of 3 chats lose a part of their answers to max_length=25; 0 have nothing left to learn" in said


def test_chats_without_their_template(chatty, tmp_path, capsys):
    turns = [{"role": role, "content": "The bear."} for role in ("user", "assistant")]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns * 2}))
    keys = ["data", str(tmp_path), "data.chat_template=false"]
    assert main(keys) == 2 and "row 1 (train-0) is a chat of several turns" in capsys.readouterr().err
    assert main([*keys, "data.loss_on=last", "--show", "1"]) == 0
    assert "The bear.\n\nThe bear.\n\nThe bear.[ The bear.</s>]" in capsys.readouterr().out


def test_paths(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    keys = with_path([str(tmp_path), "steps=2"])
    assert keys[1:] == [f'task.path="{tmp_path}"', "task.kind=auto", "evaluate=false", "steps=2"]
    (tmp_path / "validation.jsonl").write_text("")
    assert "evaluate=true" in with_path([str(tmp_path / "train.jsonl")])
    assert with_path(["steps=2"]) == ["steps=2"] and with_path([]) == []
    with pytest.raises(InputError, match=r"validation.jsonl: a task reads a directory with train.jsonl"):
        with_path([str(tmp_path / "validation.jsonl")])
