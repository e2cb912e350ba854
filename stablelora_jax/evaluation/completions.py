"""Rows of one's own: held-out loss of completions and answers of chats, accuracy of multiple choice.

The numbers are those of the validation of a training run (:mod:`stablelora_jax.runs.validation`): the loss is the mean
over all loss tokens, the end-of-sequence token among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stablelora_jax.data import Example, Text, templated, training_texts
from stablelora_jax.data.encoding import encode_many, loss_mask
from stablelora_jax.data.tasks.question import Chat, Problem, Question
from stablelora_jax.evaluation.loglikelihood import Request, likelihoods
from stablelora_jax.evaluation.tasks import EvalModel, TaskResult, choice_results
from stablelora_jax.generation.decode import decoder_of
from stablelora_jax.utils.errors import InputError


def measure_items(
    subject: EvalModel, items: Sequence[Question | Problem | Chat], split: str, *, chat: bool = False
) -> TaskResult:
    """Measure questions by accuracy (``acc``, ``acc_norm``), and other rows by the loss of their answers.

    Args:
      subject: from :func:`stablelora_jax.evaluation.tasks.subject`.
      items: of one kind, as :func:`stablelora_jax.data.tasks.jsonl.items` gives them.
      split: their name in the summary.
      chat: apply the model's chat template, to messages, or to a prompt as a user turn.

    Returns:
      Of questions the rows and metrics of multiple choice. Of others for each row its ``loglikelihood`` (nats) and the
      number of its loss ``tokens``; ``loss`` (nats per loss token) and ``token_perplexity``, its exponential.

    Raises:
      InputError: a row that does not fit the model, or a tokenizer without the chat template that is asked for.
    """
    tokenizer = decoder_of(subject.model).tokenizer
    questions = [item for item in items if isinstance(item, Question)]
    if questions:
        asked = templated_questions(tokenizer, questions) if chat else questions
        rows, metrics = choice_results(subject, asked, ("acc", "acc_norm"))
    else:
        rows, metrics = _losses(subject, tokenizer, items, chat)
    return TaskResult(rows, {"split": split, "rows": len(rows), **metrics})


def _losses(
    subject: EvalModel, tokenizer: Any, items: Sequence[Problem | Chat | Question], chat: bool
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    longest = decoder_of(subject.model).config.max_position_embeddings
    examples = encode_many(tokenizer, training_texts(items), end=True, max_length=longest, chat=chat)
    asked = [answer_requests(example) for example in examples]
    requests = [request for own in asked for request in own]
    found = likelihoods(
        subject.compute, requests, rows=subject.batch_size, max_length=longest, progress=subject.progress
    )
    loss, answers = mean_loss(requests, [one.total for one in found]), iter(found)
    rows = [
        {
            "index": i,
            "id": item.id,
            "loglikelihood": math.fsum(next(answers).total for _ in own),
            "tokens": sum(len(request.continuation) for request in own),
        }
        for i, (item, own) in enumerate(zip(items, asked, strict=True))
    ]
    return rows, {"loss": loss, "token_perplexity": math.exp(loss) if loss < 700 else None}


def answer_requests(example: Example) -> list[Request]:
    """The log-likelihood of each run of loss tokens of an example, after all before it."""
    tokens, edges = tuple(map(int, example.tokens)), np.flatnonzero(np.diff(loss_mask(example), append=0)) + 1
    return [Request(tokens[:start], tokens[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def mean_loss(requests: Sequence[Request], totals: Sequence[float]) -> float:
    """Nats per loss token of ``requests`` whose log-likelihoods are ``totals``.

    Raises:
      InputError: there is no loss token.
    """
    if not requests:
        raise InputError("no answer is left within the maximum of tokens: there is nothing to measure")
    return -math.fsum(totals) / sum(len(request.continuation) for request in requests)


def templated_questions(tokenizer: Any, questions: Sequence[Question]) -> list[Question]:
    """Each question with its prompt as a user turn in the chat template; choices lose the space around them."""
    texts = templated(tokenizer, [Text(question.prompt, "", question.id) for question in questions])
    return [
        question._replace(prompt=text.prompt, choices=tuple(choice.strip() for choice in question.choices))
        for question, text in zip(questions, texts, strict=True)
    ]
