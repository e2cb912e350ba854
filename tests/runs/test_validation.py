"""The validation_set-out loss is a mean over learnt tokens, and the accuracies are those of ``evaluate``."""

import jax
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, base_directory, init_adapters
from stablelora_jax.config.run import CompareSizesTask, DataConfig, RunConfig
from stablelora_jax.data import Example, make_batch
from stablelora_jax.data.tasks.question import Problem, Question
from stablelora_jax.evaluation.loglikelihood import make_compute
from stablelora_jax.models.pretrained.tokenizer import load_tokenizer
from stablelora_jax.parallel import pmap_layout
from stablelora_jax.runs.validation import ValidationSet, make_validation_set, validate
from tests.helpers import tiny_decoder, trained
from tests.training.oracles import masked_cross_entropy

SPEC = LoraSpec(rank=2)


def test_the_loss_is_a_mean_over_all_learnt_tokens():
    model, params = tiny_decoder()
    adapters = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    rng = np.random.default_rng(0)
    examples = [
        Example(tuple(map(int, rng.integers(0, 31, n))), int(rng.integers(0, n))) for n in rng.integers(2, 40, 41)
    ]
    for i in range(0, 41, 3):  # of chats
        n = len(examples[i].tokens)
        examples[i] = Example(examples[i].tokens, n - 1, mask=[*(int(x) for x in rng.integers(0, 2, n - 1)), 1])
    lora, layout = adapted(model, SPEC), pmap_layout()
    inner, placed = make_compute(lora, layout), (layout.place_base(params), {"lora": layout.place_state(adapters)})
    found = validate(lambda rows: inner(*placed, rows), None, ValidationSet(examples, []), length=48, rows=24)
    batch = make_batch(examples)
    logits = lora.apply({"params": params, "lora": adapters}, batch.tokens)
    total, count = masked_cross_entropy(logits, batch.tokens, batch.loss_mask)
    assert found.keys() == {"loss"} and found["loss"] == pytest.approx(float(total / count), rel=1e-5)


def test_what_is_held_out():
    tokenizer = load_tokenizer(base_directory())
    items = [Question("The cat is", (" small.", " a bear."), 1, "q-0")]
    validation_set = make_validation_set(RunConfig(task=CompareSizesTask()), tokenizer, items)
    assert validation_set.questions == items
    assert tokenizer.decode(validation_set.examples[0].tokens[validation_set.examples[0].answer :]) == " a bear.</s>"
    told = [Problem("The cat is", " small.", None, "p-0")]
    assert make_validation_set(RunConfig(), tokenizer, told).questions == []
    with pytest.raises(InputError, match="metric acc needs multiple choice"):
        make_validation_set(RunConfig(metric="acc"), tokenizer, told)


def test_questions_are_asked_in_the_template_that_is_trained():
    tokenizer = load_tokenizer(base_directory())
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}:"
    items = [Question("Who?", (" the cat", " a bear"), 1, "q-0")]
    validation_set = make_validation_set(RunConfig(data=DataConfig(chat_template=True)), tokenizer, items)
    assert validation_set.questions == [Question("<Who?>:", ("the cat", "a bear"), 1, "q-0")]
    tokens, answer = validation_set.examples[0].tokens, validation_set.examples[0].answer
    assert tokenizer.decode(tokens[answer:]) == "a bear</s>"
