"""MetaMathQA: GSM8K's and MATH's training questions, rephrased and answered anew (Yu et al., arXiv 2309.12284).

Hub columns ``{"type", "query", "original_question", "response"}``, split train only; a response ends in
``The answer is: 72``, and for GSM8K's questions in ``#### 72`` before it, which GSM8K's strict filter reads. The
prompt is GSM8K's, so that GSM8K evaluates what is trained here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from stablelora_jax.data.tasks import gsm8k, rows
from stablelora_jax.data.tasks.held_out import split_train
from stablelora_jax.data.tasks.question import Problem

HUB = rows.Hub("meta-math/MetaMathQA")
ENDING = "The answer is:"


def problems(split: str, path: str | None = None, *, held_out: bool = True) -> list[Problem]:
    """The problems of ``train``, or of ``validation``: held out, with all that goes back to the same question."""
    load = partial(rows.load, HUB, "train", path, lambda row, name: (problem(row, name), row["original_question"]))
    return split_train(load, split, held_out)


def problem(row: Mapping[str, Any], name: str) -> Problem:
    """One row."""
    query, response = rows.text(row, "query"), rows.text(row, "response")
    _, ending, target = response.rpartition(ENDING)
    if not ending or not target.strip():
        raise ValueError(f"the response does not end in {ENDING!r} and an answer")
    rows.text(row, "original_question")
    return Problem(gsm8k.prompt(query), f" {response}", target.strip(), name)
