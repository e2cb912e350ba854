"""ARC: grade-school science questions (Clark et al., arXiv 1803.05457).

Prompt, choices and metrics (``acc``, ``acc_norm``) are those of lm-evaluation-harness, ``arc/arc_easy.yaml``. Hub
columns: ``{"question", "choices": {"text": [...], "label": [...]}, "answerKey": "B", "id"}``, labels A-E or 1-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.data.tasks import rows
from stablelora_jax.data.tasks.question import Question

HUB = {
    name: rows.Hub("allenai/ai2_arc", config)
    for name, config in [("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")]
}
METRICS = ("acc", "acc_norm")


def questions(name: str, split: str, path: str | None = None) -> list[Question]:
    """The questions of one split of ``arc_easy`` or ``arc_challenge``; ``path`` and errors: ``rows.load``."""
    return rows.load(HUB[name], split, path, question)


def question(row: Mapping[str, Any], name: str) -> Question:
    """One row, as the hub has it or normalised."""
    return Question(f"Question: {rows.text(row, 'question')}\nAnswer:", *rows.choices(*rows.lettered(row)), name)
