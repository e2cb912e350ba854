"""Multiple choice by log-likelihood, as EleutherAI's lm-evaluation-harness defines it.

A choice's score is the sum of the log-probabilities of its tokens after the prompt. ``acc`` takes the highest score,
``acc_norm`` the highest score per character of the choice's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stablelora_jax.data.tasks.question import Question
from stablelora_jax.evaluation.loglikelihood import LoglikelihoodFn, encode_pair, likelihoods


def choice_scores(
    compute: LoglikelihoodFn,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_length: int,
    rows: int,
    progress: bool = False,
) -> list[np.ndarray]:
    """For each question, the log-likelihood of each of its choices after its prompt.

    Args:
      compute: ``make_compute(model)`` with its variables.
      tokenizer: a ``transformers`` tokenizer.
      questions: with their choices.
      max_length: the most tokens the model reads; of a longer text the beginning is cut.
      rows: of a batch; those of like length run together.
      progress: show the progress on stderr.

    Raises:
      InputError: a choice that has no token, or more than ``max_length``.
    """
    requests = [encode_pair(tokenizer, q.prompt, choice) for q in questions for choice in q.choices]
    answers = iter(likelihoods(compute, requests, rows=rows, max_length=max_length, progress=progress))
    return [np.array([next(answers).total for _ in q.choices]) for q in questions]


def answers(scores: Sequence[np.ndarray]) -> list[int]:
    """The index of the most likely choice of each question."""
    return [int(np.argmax(score)) for score in scores]


def correct(scores: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, list[float]]:
    """``acc`` and ``acc_norm`` of each question, 1.0 or 0.0; the space before a choice is no character of its text."""
    lengths = [np.array([len(choice.removeprefix(" ")) for choice in q.choices]) for q in questions]
    normed = [s / n for s, n in zip(scores, lengths, strict=True)]
    labels = [q.label for q in questions]
    right = {"acc": answers(scores), "acc_norm": answers(normed)}
    return {name: [float(a == b) for a, b in zip(given, labels, strict=True)] for name, given in right.items()}


def accuracies(scores: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, float]:
    """``acc`` and ``acc_norm``, fractions in [0, 1]."""
    return {name: float(np.mean(values)) for name, values in correct(scores, questions).items()}
