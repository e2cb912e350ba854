"""Which of four animals is the biggest, or the smallest?

The shipped base model has read in declarative sentences (``small_world``) how big the animals are, and has never seen a
question. Fine-tuning makes that knowledge usable in a new form. Every fourth animal is *new*: it occurs in no training
question. Half of the validation questions are about new animals only, so a right answer there comes from what the base
model knew, not from what fine-tuning taught about these animals.
"""

from __future__ import annotations

import random
from zlib import crc32

from stablelora_jax.data.tasks.question import Question
from stablelora_jax.data.tasks.small_world import ANIMALS, SIZE, draw
from stablelora_jax.utils.errors import InputError

COUNTS = {"train": 4000, "validation": 400}  # default number of questions of each split
MOST = 10000
NEW = tuple(animal.name for animal in ANIMALS[2::4])
KNOWN = tuple(animal.name for animal in ANIMALS if animal.name not in NEW)
GAP = 3  # the right animal is at least this many places of the size order away from every wrong one


def questions(split: str, *, seed: int = 0, count: int | None = None) -> list[Question]:
    """Make the questions of ``split``, ``"train"`` or ``"validation"``.

    No two are alike, and no four animals are compared in both splits the same way, whatever the seeds. Labels, the two
    words, and in validation known and new animals (``-known-`` or ``-new-`` in the id) take turns, so that every
    multiple of 16 questions is balanced.

    Raises:
      InputError: no such split, or a ``count`` that is not between 1 and 10000.
    """
    if split not in COUNTS:
        raise InputError(f"there is no split {split!r}; the splits are {', '.join(COUNTS)}")
    count = COUNTS[split] if count is None else count
    if not 1 <= count <= MOST:
        raise InputError(f"count must be between 1 and {MOST}, not {count}")
    rng = random.Random(f"{split} {seed}")
    made: dict[str, Question] = {}
    while len(made) < count:
        question = _question(rng, split, len(made))
        made.setdefault(question.prompt, question)
    return list(made.values())


def _question(rng: random.Random, split: str, number: int) -> Question:
    label, word = number % 4, ("biggest", "smallest")[number // 4 % 2]
    group = "new" if split == "validation" and number // 8 % 2 else "known"
    names = _four(rng, split, NEW if group == "new" else KNOWN, word)
    answer = names.pop(0)
    names.insert(label, answer)
    prompt = f"Which animal is the {word}: {', '.join(names[:3])} or {names[3]}?\nAnswer:"
    return Question(prompt, tuple(f" {name}" for name in names), label, f"{split}-{group}-{number:04d}")


def _four(rng: random.Random, split: str, names: tuple[str, ...], word: str) -> list[str]:
    """Four names that belong to ``split``, the right one first, the others in random order."""
    while True:
        first, *others = draw(rng, names, 4)
        clear = all(_lead(first, other, word) >= GAP for other in others)
        if clear and (names is NEW or _split_of({first, *others}, word) == split):
            return [first, *others]


def _lead(one: str, other: str, word: str) -> int:
    """By how many places of the size order ``one`` is more ``word`` than ``other``."""
    return SIZE[one] - SIZE[other] if word == "biggest" else SIZE[other] - SIZE[one]


def _split_of(names: set[str], word: str) -> str:
    """The one split in which these animals may be compared: decided by what they are, not by chance."""
    return "train" if crc32(" ".join((word, *sorted(names))).encode()) % 8 else "validation"
