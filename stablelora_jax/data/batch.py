"""Batches as the model takes them, and rows of one text each, padded to one of few lengths.

A batch is ``(B, T)`` int32 throughout. Rows are padded at the end, where causality hides pads from every real token,
and pads are told by length, never by token id: a tokenizer whose pad is its end-of-sequence still trains the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stablelora_jax.data.encoding import Example
from stablelora_jax.utils.errors import InputError

SHORTEST = 32  # rows are padded to 32, 64, 96, 128, 192, 256, 384, 512, ...: a run compiles a handful of shapes


class Batch(NamedTuple):
    """Rows of tokens as the model takes them; every field but the last is (B, T) int32."""

    tokens: np.ndarray
    loss_mask: np.ndarray  # 1 where the token is to be predicted
    segment_ids: np.ndarray  # 1, 2, ... on the tokens of a row's texts, 0 on pads
    positions: np.ndarray  # 0, 1, 2, ... in each segment
    at: np.ndarray | None = None  # (B, K) int32: where loss_mask is 1, then 0s; the head then reads nothing else


def make_batch(
    examples: Sequence[Example], rows: int | None = None, longest: int | None = None, learnt: int | None = None
) -> Batch:
    """Pad ``examples`` to one batch, one a row; further empty rows up to ``rows`` count for nothing.

    T is :func:`bucket` of ``longest``, by default of the longest example here; a host that holds a part of a batch
    passes the longest of the whole. ``learnt`` is the K of ``at``; None: no ``at``.
    """
    if not isinstance(examples, Sequence) or not examples:
        raise InputError("a batch needs at least one example")
    texts = [_ids(example, i) for i, example in enumerate(examples)]
    most = max(len(text) for text in texts)
    T, B = bucket(longest or most), rows or len(examples)
    if most > T or len(examples) > B:
        raise InputError(f"{len(examples)} examples of up to {most} tokens do not fit in {B} rows of {T}")
    tokens, mask, segments = (np.zeros((B, T), np.int32) for _ in range(3))
    for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
        n = len(text)
        tokens[i, :n], segments[i, :n] = text, 1
        mask[i, max(1, example.answer) : n] = 1  # nothing predicts the first token
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    at = None if learnt is None else loss_positions(mask, learnt)
    return Batch(tokens, mask, segments, np.ascontiguousarray(positions), at)


def _ids(example: Example, number: int) -> np.ndarray:
    """The tokens of ``example``, which are int32."""
    try:
        ids = np.asarray(example.tokens)
        ids = ids if ids.size else np.zeros(0, np.int32)
        fits = ids.ndim == 1 and isinstance(example.answer, int | np.integer) and np.issubdtype(ids.dtype, np.integer)
    except (AttributeError, ValueError):  # no example; lists of different lengths
        fits = False
    if not fits or not (np.can_cast(ids.dtype, np.int32) or -(2**31) <= ids.min() <= ids.max() < 2**31):
        raise InputError(f"example {number} holds what is no token id of int32")
    return ids


def loss_positions(loss_mask: np.ndarray, most: int) -> np.ndarray:
    """Where ``loss_mask`` (B, T) is 1, in order, and then 0s: (B, most) int32; where ``most`` is 0, (B, 1)."""
    most = max(1, most)
    counts = loss_mask.sum(axis=1)
    if counts.max(initial=0) > most:
        raise InputError(f"a row learns {counts.max()} tokens, and there is room for {most}")
    order = np.argsort(1 - loss_mask, axis=1, kind="stable")[:, :most]
    order = np.pad(order, ((0, 0), (0, most - order.shape[1])))
    return np.where(np.arange(most) < counts[:, None], order, 0).astype(np.int32)


def bucket(length: int) -> int:
    """The padded length for a row of ``length`` tokens: at most half as long again, and one of few."""
    T = SHORTEST
    while T < length:
        T = T // 2 * 3 if T & (T - 1) == 0 else T // 3 * 4
    return T
