"""Rows of one's own are measured as the validation of a training run measures them."""

import math

import pytest

from stablelora_jax import InputError, base_directory, load_pretrained
from stablelora_jax.config.run import DataConfig, JsonlTask, RunConfig
from stablelora_jax.data.tasks.question import Chat, Problem, Question
from stablelora_jax.evaluation.completions import measure_items
from stablelora_jax.evaluation.tasks import subject
from stablelora_jax.runs.validation import make_validation_set, validate

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
CHOICES = (" horse", " snail", " a lion and a cow")
QUESTIONS = [
    Question(f"The biggest is: {a}?", CHOICES, i % 3, f"q-{i}") for i, a in enumerate(("a cat", "a", "b", "ox"))
]
PROBLEMS = [Problem("The cat is", " bigger than the ant.", None, "p-0"), Problem("A bear", " is", None, "p-1")]
TURNS = tuple({"role": r, "content": c} for r, c in (("user", "Which is big?"), ("assistant", "The bear is."))) * 2
CHATS = [Chat("Which is big?", " The bear is.", None, "c-0", TURNS), Chat("x", " y", None, "c-1", TURNS[:2])]


@pytest.fixture(scope="module")
def one():
    model, params = load_pretrained(base_directory())
    model.tokenizer.chat_template = TEMPLATE
    return subject(model, {"params": params}, batch_size=8)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind,items", [("choice", QUESTIONS), ("completion", PROBLEMS), ("chat", CHATS)])
def test_the_numbers_are_those_of_validation(one, kind, items, chat):
    config = RunConfig(task=JsonlTask(kind=kind, path="."), data=DataConfig(chat_template=chat))
    validation_set = make_validation_set(config, one.model.tokenizer, items)
    expected = validate(one.compute, one.model.tokenizer, validation_set, length=256, rows=8)
    rows, summary = measure_items(one, items, "validation", chat=chat)
    assert summary["split"] == "validation" and summary["rows"] == len(items) == len(rows)
    assert [(row["index"], row["id"]) for row in rows] == [(i, item.id) for i, item in enumerate(items)]
    for name in ("acc", "acc_norm") if kind == "choice" else ("loss",):
        assert summary[name] == expected[name]
    if kind != "choice":
        assert summary["token_perplexity"] == math.exp(summary["loss"])
        assert summary["loss"] == pytest.approx(-sum(r["loglikelihood"] for r in rows) / sum(r["tokens"] for r in rows))


def test_the_template_changes_the_numbers_and_must_be_there(one):
    plain, asked = (measure_items(one, PROBLEMS, "test", chat=chat).summary["loss"] for chat in (False, True))
    assert abs(plain - asked) > 1e-3
    bare, params = load_pretrained(base_directory())
    with pytest.raises(InputError, match="has no chat template"):
        measure_items(subject(bare, {"params": params}), CHATS, "test", chat=True)
