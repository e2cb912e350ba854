"""Multiple choice by log-likelihood, as EleutherAI's lm-evaluation-harness defines it.

A choice's score is the sum of the log-probabilities of its tokens after the prompt. ``acc`` takes the highest score,
``acc_norm`` the highest score per character of the choice's text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from stablelora_jax.data import Batch, encode, make_batch
from stablelora_jax.intercept import Adapted
from stablelora_jax.losses import token_log_probs
from stablelora_jax.parallel import AXIS, split_rows
from stablelora_jax.tasks.question import Question

Scorer = Callable[[Any, Any, Batch], np.ndarray]


def make_scorer(model: Adapted) -> Scorer:
    """``(params, adapters, batch) -> (B,)`` summed log-probability of each row's ``loss_mask`` tokens.

    ``params`` and ``adapters`` are placed on all devices by :func:`stablelora_jax.parallel.replicate`.
    """

    def score(params: Any, adapters: Any, batch: Batch) -> jax.Array:
        variables = {"params": params, "lora": adapters}
        logits = model.apply(variables, batch.tokens, batch.positions, batch.segment_ids)
        return (token_log_probs(logits, batch.tokens) * batch.loss_mask).sum(axis=1)

    mapped = jax.pmap(score, axis_name=AXIS, in_axes=(None, None, 0))
    return lambda params, adapters, batch: np.asarray(mapped(params, adapters, split_rows(batch))).reshape(-1)


def score_choices(
    scorer: Scorer,
    params: Any,
    adapters: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    length: int,
    rows: int,
    progress: bool = False,
) -> list[np.ndarray]:
    """For each question, the score of each of its choices (float32). Batches hold ``rows`` rows of like length."""
    tasks = [(i, j) for i, question in enumerate(questions) for j in range(len(question.choices))]
    texts = [
        encode(tokenizer, questions[i].prompt, questions[i].choices[j], end=False, length=length) for i, j in tasks
    ]
    order = sorted(range(len(tasks)), key=lambda t: -len(texts[t].tokens))
    scores = [np.zeros(len(question.choices), np.float32) for question in questions]
    for start in tqdm(range(0, len(order), rows), desc="evaluate", disable=not progress, leave=False):
        chunk = order[start : start + rows]
        values = scorer(params, adapters, make_batch([texts[t] for t in chunk], rows))
        for t, value in zip(chunk, values, strict=False):
            scores[tasks[t][0]][tasks[t][1]] = value
    return scores


def answers(scores: Sequence[np.ndarray]) -> list[int]:
    """The index of the most likely choice of each question."""
    return [int(np.argmax(score)) for score in scores]


def accuracies(scores: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, float]:
    """``acc`` and ``acc_norm``, fractions in [0, 1]."""
    right = [answer == q.label for answer, q in zip(answers(scores), questions, strict=True)]
    lengths = [np.array([len(choice.lstrip()) for choice in q.choices]) for q in questions]
    normed = [s / n for s, n in zip(scores, lengths, strict=True)]
    right_normed = [answer == q.label for answer, q in zip(answers(normed), questions, strict=True)]
    return {"acc": float(np.mean(right)), "acc_norm": float(np.mean(right_normed))}
