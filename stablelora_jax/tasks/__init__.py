"""What is learnt. One file a task, one line here; a task is a list of :class:`Question` for each split."""

from __future__ import annotations

from stablelora_jax.run_config import ArcTask, CompareSizesTask
from stablelora_jax.tasks import arc, compare_sizes
from stablelora_jax.tasks.question import Question


def load_questions(task: CompareSizesTask | ArcTask, split: str) -> list[Question]:
    """The questions of ``train`` or ``validation``, cut to the task's limit for that split."""
    if isinstance(task, CompareSizesTask):
        questions = compare_sizes.questions(split)
    else:
        questions = arc.questions(task.name, split, task.path)
    return questions[: task.train_limit if split == "train" else task.validation_limit]
