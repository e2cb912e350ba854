"""Tasks. One file each, one line here; a split is a list of :class:`Question` or of :class:`Problem`."""

from __future__ import annotations

from stablelora_jax.config.run import ArcTask, CompareSizesTask, JsonlTask, MathTask, QaTask
from stablelora_jax.data.tasks import compare_sizes, gsm8k, jsonl, merged_qa, metamathqa, schemas
from stablelora_jax.data.tasks.question import Chat, Problem, Question

Task = CompareSizesTask | ArcTask | QaTask | MathTask | JsonlTask


def load_questions(task: Task, split: str) -> list[Question] | list[Problem] | list[Chat]:
    """What ``train`` or ``validation`` holds, cut to the task's limit for that split.

    Multiple choice gives questions; ``gsm8k``, ``metamathqa`` and ``jsonl`` of other kinds give problems.
    """
    found: list[Question] | list[Problem] | list[Chat]
    if isinstance(task, CompareSizesTask):
        found = compare_sizes.questions(split)
    elif isinstance(task, MathTask):
        found = {"gsm8k": gsm8k, "metamathqa": metamathqa}[task.name].problems(split, task.path, held_out=task.held_out)
    elif isinstance(task, JsonlTask):
        kind = schemas.recognised(task, lambda text: None).kind
        assert kind != "auto"
        found = jsonl.items(kind, split, task.path, task.hub, task.hub_config, task.fields)
    elif task.name == "merged_qa":
        found = merged_qa.questions(split, task.path)
    else:
        found = merged_qa.part_questions(task.name, split, task.path)
    return found[: task.train_limit if split == "train" else task.validation_limit]
