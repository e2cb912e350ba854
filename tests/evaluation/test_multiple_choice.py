"""Scores and accuracies against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec, adapted, base_directory, init_adapters, load_pretrained
from stablelora_jax.data.tasks import compare_sizes
from stablelora_jax.data.tasks.question import Question
from stablelora_jax.evaluation.loglikelihood import make_compute
from stablelora_jax.evaluation.multiple_choice import accuracies, answers, choice_scores
from stablelora_jax.parallel import mesh_layout, pmap_layout
from tests.helpers import trained


@pytest.fixture(scope="module", params=[pmap_layout, lambda: mesh_layout(2, 2, 2, key_value_heads=2)])
def scored(request):
    model, params = load_pretrained(base_directory())
    spec = LoraSpec()
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec, size=0.1)
    questions = compare_sizes.questions("validation")[:5]
    questions.append(Question("The", (" cat", " big brown bear is here"), 0, "uneven"))
    low_rank, layout = adapted(model, spec), request.param()
    inner, placed = make_compute(low_rank, layout), (layout.place_base(params), {"lora": layout.place_state(adapters)})
    scores = choice_scores(lambda rows: inner(*placed, rows), model.tokenizer, questions, max_length=128, rows=8)
    return low_rank, params, adapters, model.tokenizer, questions, scores


def test_scores_are_sums_of_log_probabilities(scored):
    low_rank, params, adapters, tokenizer, questions, scores = scored
    apply = jax.jit(lambda t: low_rank.apply({"params": params, "lora": adapters}, t))
    for question, found in zip(questions, scores, strict=True):
        for choice, score in zip(question.choices, found, strict=True):
            prompt, whole = tokenizer(question.prompt).input_ids, tokenizer(question.prompt + choice).input_ids
            padded = jnp.asarray([whole + [0] * (64 - len(whole))])
            log_probs = jax.nn.log_softmax(np.float64(apply(padded))[0])
            expected = sum(float(log_probs[t - 1, whole[t]]) for t in range(len(prompt), len(whole)))
            assert score == pytest.approx(expected, rel=1e-4)


def test_accuracies():
    questions = [
        Question("", (" aa", " bbbb"), 0, "1"),
        Question("", (" aa", " bbbb"), 1, "2"),
        Question("", (" a", " b"), 0, "3"),
    ]
    scores = [np.array([-2.0, -3.0]), np.array([-2.0, -3.0]), np.array([-1.0, -5.0])]
    assert answers(scores) == [0, 0, 0]
    assert accuracies(scores, questions) == {"acc": pytest.approx(2 / 3), "acc_norm": pytest.approx(2 / 3)}
    assert accuracies(scores[:1], questions[:1]) == {"acc": 1.0, "acc_norm": 0.0}
    short = Question("", (" a", " bbb"), 1, "the space before a choice does not count")
    assert accuracies([np.array([-2.0, -5.0])], [short]) == {"acc": 0.0, "acc_norm": 1.0}
