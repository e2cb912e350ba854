"""What every multiple-choice task is made of."""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """One multiple-choice question as the model sees it: ``prompt + choices[label]`` is the right text."""

    prompt: str  # ends where the answer begins, without trailing space
    choices: tuple[str, ...]  # each begins with the space that separates it from the prompt
    label: int  # index into choices
    id: str  # for reports: never the text itself
