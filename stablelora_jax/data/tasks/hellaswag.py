"""HellaSwag: which sentence goes on? (Zellers et al., arXiv 1905.07830).

Prompt, choices and metrics are those of lm-evaluation-harness, ``hellaswag/hellaswag.yaml`` and ``utils.py``. Hub
columns: ``{"activity_label", "ctx_a", "ctx_b", "endings": [...], "label": "0".."3"}``; the test split is unlabelled and
refused. A normalised row's ``context`` stands for ``ctx_a + " " + ctx_b.capitalize()``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stablelora_jax.data.tasks import rows
from stablelora_jax.data.tasks.question import Question

HUB = rows.Hub("Rowan/hellaswag")
METRICS = ("acc", "acc_norm")


def questions(split: str, path: str | None = None) -> list[Question]:
    """The questions of one split; ``path`` and errors: ``rows.load``."""
    return rows.load(HUB, split, path, question)


def question(row: Mapping[str, Any], name: str) -> Question:
    """One row, as the hub has it or normalised."""
    if "choices" in row:
        context, endings, label = row["context"], row["choices"], row["label"]
    else:
        context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
        endings, label = row["endings"], rows.numbered(row["label"], 0)
    prompt = preprocess(f"{rows.text(row, 'activity_label')}: {context}")
    return Question(prompt, *rows.choices([preprocess(ending) for ending in endings], label), name)


def preprocess(text: str) -> str:
    """Without the marks that WikiHow left."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
