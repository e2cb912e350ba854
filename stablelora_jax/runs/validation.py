"""Evaluation on the validation split during training: the loss and, for multiple choice, the accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stablelora_jax.config.run import RunConfig, takes_template
from stablelora_jax.data import Example, training_texts
from stablelora_jax.data.encoding import encode_many
from stablelora_jax.data.tasks.question import Chat, Problem, Question
from stablelora_jax.evaluation.completions import answer_requests, mean_loss, templated_questions
from stablelora_jax.evaluation.loglikelihood import LoglikelihoodFn, likelihoods
from stablelora_jax.evaluation.multiple_choice import accuracies, answers, choice_scores
from stablelora_jax.parallel import is_primary
from stablelora_jax.utils.errors import InputError


class ValidationSet(NamedTuple):
    """The validation split, tokenised."""

    examples: Sequence[Example]  # the right answers with their end-of-sequence token, as in training
    questions: Sequence[Question]  # empty where the task is not multiple choice


def make_validation_set(config: RunConfig, tokenizer: Any, items: Sequence[Question | Problem | Chat]) -> ValidationSet:
    """Tokenise the right answers, truncated as in training; questions are in the chat template where training is.

    Raises:
      InputError: ``metric`` is an accuracy and the task is not multiple choice; a text is too long.
    """
    questions = [item for item in items if isinstance(item, Question)]
    if config.metric != "loss" and len(questions) < len(items):
        raise InputError(f"metric {config.metric} needs multiple choice, which {config.task.name} is not: take loss")
    chat = takes_template(config)
    if chat:
        questions = templated_questions(tokenizer, questions)
    examples = encode_many(
        tokenizer,
        training_texts(items),
        end=True,
        max_length=config.max_length,
        truncate=config.data.truncate,
        chat=chat,
        loss_on=config.data.loss_on,
    )
    return ValidationSet(list(examples), questions)


def validate(
    compute: LoglikelihoodFn, tokenizer: Any, validation_set: ValidationSet, *, length: int, rows: int
) -> dict[str, Any]:
    """``loss`` (nats per loss token) and, where there are questions, ``acc``, ``acc_norm`` and the ``answers``.

    ``compute`` is a result of ``make_compute`` bound to parameters and adapters; ``rows`` is the batch size.
    """
    progress = is_primary()
    requests = [request for example in validation_set.examples for request in answer_requests(example)]
    found = likelihoods(compute, requests, rows=rows, max_length=length, progress=progress)
    result: dict[str, Any] = {"loss": mean_loss(requests, [one.total for one in found])}
    if validation_set.questions:
        scores = choice_scores(
            compute, tokenizer, validation_set.questions, max_length=length, rows=rows, progress=progress
        )
        result |= {**accuracies(scores, validation_set.questions), "questions": len(scores), "answers": answers(scores)}
    return result
