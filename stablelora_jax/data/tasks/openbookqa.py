"""OpenBookQA: elementary science, without the book (Mihaylov et al., arXiv 1809.02789).

Prompt (the stem alone), choices and metrics are those of lm-evaluation-harness, ``openbookqa/openbookqa.yaml``. Hub
columns: ``{"id", "question_stem", "choices": {"text", "label"}, "answerKey"}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.data.tasks import rows
from stablelora_jax.data.tasks.question import Question

HUB = rows.Hub("allenai/openbookqa", "main")
METRICS = ("acc", "acc_norm")


def questions(split: str, path: str | None = None) -> list[Question]:
    """The questions of one split; ``path`` and errors: ``rows.load``."""
    return rows.load(HUB, split, path, question)


def question(row: Mapping[str, Any], name: str) -> Question:
    """One row, as the hub has it or normalised."""
    stem = rows.text(row, "question_stem" if "question_stem" in row else "question")
    return Question(stem, *rows.choices(*rows.lettered(row)), name)
