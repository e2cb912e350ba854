"""From questions to batches: tokenise, mark what is learnt, pad, and shuffle by a rule that needs no state.

A batch is ``(B, T)`` int32 throughout. Rows are padded at the end, where causality hides pads from every real token,
and pads are told by length, never by token id: a tokenizer whose pad is its end-of-sequence still trains the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stablelora_jax.errors import InputError
from stablelora_jax.tasks.question import Question

SHORTEST = 32  # rows are padded to 32, 64, 96, 128, 192, 256, 384, 512, ...: a run compiles a handful of shapes


class Batch(NamedTuple):
    """Rows of tokens as the model takes them; every field (B, T) int32."""

    tokens: np.ndarray
    loss_mask: np.ndarray  # 1 where the token is to be predicted
    segment_ids: np.ndarray  # 1 on tokens, 0 on pads
    positions: np.ndarray  # 0, 1, 2, ... in each segment


class Example(NamedTuple):
    """One tokenised text; the tokens from ``answer`` on are the ones to be learnt or scored."""

    tokens: tuple[int, ...]
    answer: int
    cut: int = 0  # tokens that were dropped from the beginning


def encode(tokenizer: Any, prompt: str, answer: str, *, end: bool, length: int) -> Example:
    """Tokenise ``prompt + answer`` in one piece; the answer begins where the prompt's own tokens stop agreeing.

    Args:
      tokenizer: a ``transformers`` tokenizer; it decides whether a text begins with a BOS token.
      prompt: what the model sees.
      answer: what it should say.
      end: whether the end-of-sequence token belongs to the answer (in training, so that the model learns to stop).
      length: the most tokens kept; a longer text loses its beginning.

    Raises:
      InputError: the answer alone is longer than ``length``, or is empty.
    """
    start = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id][:1]
    given = start + tokenizer(prompt, add_special_tokens=False).input_ids
    whole = start + tokenizer(prompt + answer, add_special_tokens=False).input_ids
    same = next((i for i, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), min(len(given), len(whole)))
    whole = whole + [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else whole
    cut = max(0, len(whole) - length)
    if same >= len(whole) or same < cut + 1:
        raise InputError(f"an answer of {len(whole) - same} tokens does not fit into length={length} with its prompt")
    return Example(tuple(whole[cut:]), same - cut, cut)


def training_examples(tokenizer: Any, questions: Sequence[Question], length: int) -> list[Example]:
    """Each question with its right answer and the end-of-sequence token."""
    return [encode(tokenizer, q.prompt, q.choices[q.label], end=True, length=length) for q in questions]


def make_batch(examples: Sequence[Example], rows: int | None = None) -> Batch:
    """Pad ``examples`` to one batch, T by :func:`bucket`; further empty rows up to ``rows`` count for nothing."""
    T = bucket(max(len(example.tokens) for example in examples))
    tokens, mask, segments = (np.zeros((rows or len(examples), T), np.int32) for _ in range(3))
    for i, example in enumerate(examples):
        n = len(example.tokens)
        tokens[i, :n], segments[i, :n], mask[i, example.answer : n] = example.tokens, 1, 1
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    return Batch(tokens, mask, segments, np.ascontiguousarray(positions))


def bucket(length: int) -> int:
    """The padded length for a row of ``length`` tokens: at most half as long again, and one of few."""
    T = SHORTEST
    while T < length:
        T = T // 2 * 3 if T & (T - 1) == 0 else T // 3 * 4
    return T


def rows_of_step(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """The ``batch_size`` rows of step ``step`` (from 0): slices of one endless sequence of shuffled epochs.

    A function of its arguments alone, so a run that is resumed at a step goes on with the very rows it would have had.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in {p // count for p in places}}
    return [int(orders[place // count][place % count]) for place in places]
