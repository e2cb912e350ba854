"""GSM8K: grade-school mathematics in words (Cobbe et al., arXiv 2110.14168), answered by generation.

Prompt, stops, extraction and ``exact_match`` are those of lm-evaluation-harness, ``gsm8k/gsm8k.yaml``, without examples
in the prompt (zero-shot). Hub columns ``{"question", "answer"}``, splits train and test; the answer ends in
``#### 72``, and its calculator marks ``<<48/2=24>>`` are removed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from stablelora_jax.data.tasks import rows
from stablelora_jax.data.tasks.held_out import split_train
from stablelora_jax.data.tasks.question import Problem

HUB = rows.Hub("openai/gsm8k", "main")
STOPS = ("Question:", "</s>", "<|im_end|>")
METRICS = ("exact_match",)
FILTERS = {  # name: (pattern, which of its finds)
    "strict-match": (re.compile(r"#### (\-?[0-9\.\,]+)"), 0),
    "flexible-extract": (re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"), -1),
}
IGNORED = (r",", r"\$", r"(?s).*#### ", r"\.$")
NOTHING = "[invalid]"


def problems(split: str, path: str | None = None, *, held_out: bool = True) -> list[Problem]:
    """The problems of ``train``, ``validation`` (held out of the training split) or ``test``; see ``rows.load``."""
    if split == "test":
        return rows.load(HUB, split, path, problem)
    load = partial(rows.load, HUB, "train", path, lambda row, name: (problem(row, name), row["question"]))
    return split_train(load, split, held_out)


def problem(row: Mapping[str, Any], name: str) -> Problem:
    """One row."""
    question, answer = rows.text(row, "question"), rows.text(row, "answer")
    steps, mark, target = answer.rpartition("#### ")
    if not mark or not re.search(r"\d", target):
        raise ValueError("the answer does not end in '#### ' and a number")
    clean = re.sub(r"<<[^<>]*>>", "", steps) + mark + target
    return Problem(prompt(question), f" {clean}", normalised(answer), name)


def prompt(question: str) -> str:
    """The prompt; MetaMathQA trains on the same."""
    return f"Question: {question}\nAnswer:"


def extracted(generated: str) -> dict[str, str]:
    """The answer that each filter finds in what was generated; ``[invalid]`` where it finds none."""
    return {name: _find(pattern.findall(generated), place) for name, (pattern, place) in FILTERS.items()}


def exact_match(answer: str, target: str) -> float:
    """1.0 where both say the same, but for commas, dollars, a last full stop, and all before ``#### ``; else 0.0."""
    return float(normalised(answer) == normalised(target))


def normalised(text: str) -> str:
    """``text`` as it is compared."""
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def _find(finds: list[Any], place: int) -> str:
    if not finds:
        return NOTHING
    groups = finds[place] if isinstance(finds[place], tuple) else (finds[place],)
    return next((group for group in groups if group), NOTHING).strip()
