"""What is learnt. One file a task, one line here; a task is a list of :class:`Question` for each split."""

from __future__ import annotations

from stablelora_jax.run_config import ArcTask, SmallWorldTask
from stablelora_jax.tasks import arc
from stablelora_jax.tasks.question import Question


def load_questions(task: SmallWorldTask | ArcTask, split: str) -> list[Question]:
    """The questions of ``train`` or ``validation``, cut to the task's limit for that split."""
    if isinstance(task, SmallWorldTask):
        questions = small_world.questions(split)
    else:
        questions = arc.questions(task.name, split, task.path)
    return questions[: task.train_limit if split == "train" else task.validation_limit]
