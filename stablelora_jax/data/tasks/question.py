"""What every task is made of: questions with choices, or problems with an answer in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One text to continue: ``prompt + answer`` is trained on; where ``target`` is given, what is said is compared."""

    prompt: str  # ends where the answer begins, without trailing space
    answer: str  # begins with the space or line break that separates it from the prompt
    target: str | None  # what an answer is judged by (a number, for GSM8K); None where it cannot be judged
    id: str  # for reports: never the text itself


class Chat(NamedTuple):
    """A chat; its last answer is a :class:`Problem` to models without a template; blank lines join messages."""

    prompt: str
    answer: str
    target: str | None
    id: str
    messages: Sequence[Mapping[str, Any]]  # all of them, as they are
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas


class Question(NamedTuple):
    """One multiple-choice question as the model sees it: ``prompt + choices[label]`` is the right text."""

    prompt: str  # ends where the answer begins, without trailing space
    choices: tuple[str, ...]  # each begins with the space that separates it from the prompt
    label: int  # index into choices
    id: str  # for reports: never the text itself
