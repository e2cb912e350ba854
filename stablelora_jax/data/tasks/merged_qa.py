"""The five multiple-choice sets as one, one after another in a fixed order; training shuffles.

A local directory holds one directory for each set, by its name. Where a set lacks the split, the whole is refused and
what is missing is named: four sets under the name of five would not be the paper's task.
"""

from __future__ import annotations

from pathlib import Path

from stablelora_jax.data.tasks import arc, hellaswag, openbookqa, social_i_qa
from stablelora_jax.data.tasks.question import Question
from stablelora_jax.utils.errors import InputError

PARTS = ("hellaswag", "social_i_qa", "openbookqa", "arc_easy", "arc_challenge")
METRICS = ("acc", "acc_norm")


def questions(split: str, path: str | None = None) -> list[Question]:
    """The questions of one split of all five, each with the set's name before its id.

    Raises:
      InputError: naming each set that lacks the split, or whose rows are damaged.
    """
    found, missing = [], []
    for name in PARTS:
        try:
            part = part_questions(name, split, str(Path(path) / name) if path else None)
            found += [question._replace(id=f"{name}-{question.id}") for question in part]
        except InputError as error:
            missing.append(f"{name} ({error})")
    if missing:
        raise InputError(f"merged_qa {split} is not complete without {', '.join(missing)}")
    return found


def part_questions(name: str, split: str, path: str | None) -> list[Question]:
    """The questions of one of the five; ``path`` is its own directory."""
    if name in arc.HUB:
        return arc.questions(name, split, path)
    module = {"hellaswag": hellaswag, "social_i_qa": social_i_qa, "openbookqa": openbookqa}[name]
    found: list[Question] = module.questions(split, path)
    return found
