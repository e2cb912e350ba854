"""ARC: grade-school science questions (Clark et al., arXiv 1803.05457), from the hub or from a local directory.

Prompt and choices are those of EleutherAI's lm-evaluation-harness, ``Question: ...\\nAnswer:`` and `` <choice>``. A
local directory holds ``train.jsonl`` and ``validation.jsonl`` (or ``.jsonl.gz``), one object a line, either
``{"question", "choices": [...], "label": 0, "id"}`` or the hub's own columns
``{"question", "choices": {"text": [...], "label": [...]}, "answerKey": "B", "id"}``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stablelora_jax.errors import InputError
from stablelora_jax.tasks.question import Question

HUB = "allenai/ai2_arc"
CONFIGS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


def questions(name: str, split: str, path: str | None = None) -> list[Question]:
    """The questions of one split.

    Args:
      name: ``arc_easy`` or ``arc_challenge``.
      split: ``train``, ``validation`` or ``test``.
      path: a local directory; None for the hub's ``allenai/ai2_arc`` through ``datasets``.

    Raises:
      InputError: the split cannot be had, is empty, or has a damaged row, which is named by its number.
    """
    origin, rows = _local_rows(Path(path), split) if path else _hub_rows(name, split)
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(_question(row, f"{split}-{number - 1}"))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{origin}: row {number} is damaged ({type(error).__name__}: {error})") from None
    if not found:
        raise InputError(f"{origin} has no rows")
    return found


def _question(row: Mapping[str, Any], number: str) -> Question:
    choices = row["choices"]
    if isinstance(choices, Mapping):
        texts, label = choices["text"], choices["label"].index(row["answerKey"])
    else:
        texts, label = choices, row["label"]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(texts):
        raise ValueError(f"label {label!r} for {len(texts)} choices")
    if not all(isinstance(text, str) and text.strip() for text in (row["question"], *texts)):
        raise ValueError("a text is empty or no string")
    prompt = f"Question: {row['question']}\nAnswer:"
    return Question(prompt, tuple(f" {text}" for text in texts), label, str(row.get("id", number)))


def _local_rows(directory: Path, split: str) -> tuple[str, list[Any]]:
    plain, packed = directory / f"{split}.jsonl", directory / f"{split}.jsonl.gz"
    file = plain if plain.is_file() else packed
    if not file.is_file():
        raise InputError(f"{directory} has neither {plain.name} nor {packed.name}")
    opened = file.open("rt", encoding="utf-8") if file == plain else gzip.open(file, "rt", encoding="utf-8")
    rows = []
    with opened as lines:
        try:
            for line in lines:
                rows.append(json.loads(line))
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{file}: line {len(rows) + 1} is not JSON ({error})") from None
    return str(file), rows


def _hub_rows(name: str, split: str) -> tuple[str, Iterable[Any]]:
    import datasets

    origin = f"{HUB} {CONFIGS[name]} {split}"
    try:
        return origin, datasets.load_dataset(HUB, CONFIGS[name], split=split)
    except Exception as error:  # offline, unknown split, damaged cache: datasets raises many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise InputError(f"{origin} could not be had ({reason}); give a local directory as task.path") from None
