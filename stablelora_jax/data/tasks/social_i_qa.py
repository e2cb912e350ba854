"""Social IQa: what people do and why (Sap et al., arXiv 1904.09728).

Prompt, choices and metric (``acc`` alone) are those of lm-evaluation-harness, ``siqa/siqa.yaml``. Hub columns:
``{"context", "question", "answerA", "answerB", "answerC", "label": "1" | "2" | "3"}``, train and validation. The hub's
``allenai/social_i_qa`` is a script, which ``datasets`` refuses since version 4; ``lighteval/siqa`` has the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.data.tasks import rows
from stablelora_jax.data.tasks.question import Question

HUB = rows.Hub("lighteval/siqa")
METRICS = ("acc",)


def questions(split: str, path: str | None = None) -> list[Question]:
    """The questions of one split; ``path`` and errors: ``rows.load``."""
    return rows.load(HUB, split, path, question)


def question(row: Mapping[str, Any], name: str) -> Question:
    """One row, as the hub has it or normalised."""
    if "choices" in row:
        texts, label = row["choices"], row["label"]
    else:
        texts, label = [row[f"answer{letter}"] for letter in "ABC"], rows.numbered(row["label"], 1)
    prompt = f"Q: {rows.text(row, 'context')} {rows.text(row, 'question')}\nA:"
    return Question(prompt, *rows.choices(texts, label), name)
