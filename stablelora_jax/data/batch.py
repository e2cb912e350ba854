"""Batches as the model takes them, with one text a row, padded to one of few lengths.

A batch is ``(B, T)`` int32. Rows are padded at the end, where causality hides pads from every real token. Pads are
known by position, never by token id, so a tokenizer whose pad is its end-of-sequence token still trains the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from stablelora_jax.data.encoding import Example, loss_mask
from stablelora_jax.utils.errors import InputError

SHORTEST = 32  # rows are padded to 32, 48, 64, 96, 128, 192, 256, 384, ...: a run compiles a handful of shapes


class Batch(NamedTuple):
    """Rows of tokens as the model takes them; every field but the last is (B, T) int32."""

    tokens: Int[np.ndarray, "B T"]
    loss_mask: Shaped[np.ndarray, "B T"]  # 1 on loss tokens, the tokens to be predicted
    segment_ids: Int[np.ndarray, "B T"]  # 1, 2, ... on the tokens of a row's texts, 0 on pads
    positions: Int[np.ndarray, "B T"]  # 0, 1, 2, ... in each segment
    # positions of the loss tokens, in order, then 0s; given, the head computes logits for these alone
    loss_positions: Int[np.ndarray, "B K"] | None = None


def make_batch(
    examples: Sequence[Example],
    rows: int | None = None,
    longest: int | None = None,
    max_loss_tokens: int | None = None,
) -> Batch:
    """Pad ``examples`` to one batch, one a row.

    Args:
      examples: one for each row.
      rows: B; rows beyond the examples are empty. None: as many as there are examples.
      longest: T is :func:`bucket` of it; None: of the longest example here. A host that holds a part of a batch passes
        the longest of the whole.
      max_loss_tokens: the K of ``loss_positions``; None: no ``loss_positions``.

    Raises:
      InputError: no examples, token ids that are no int32, examples that do not fit into B rows of T, or a row with
        more loss tokens than ``max_loss_tokens``.

    Example::

      >>> batch = make_batch([Example((5, 6, 7), answer=2)], max_loss_tokens=2)
      >>> batch.tokens.shape, batch.tokens[0, :4].tolist(), batch.loss_mask[0, :4].tolist()
      ((1, 32), [5, 6, 7, 0], [0, 0, 1, 0])
      >>> batch.loss_positions.tolist()
      [[2, 0]]
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
        mask[i, :n] = loss_mask(example)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    at = None if max_loss_tokens is None else positions_of_mask(mask, max_loss_tokens)
    return Batch(tokens, mask, segments, np.ascontiguousarray(positions), at)


def _ids(example: Example, number: int) -> np.ndarray:
    """The tokens of ``example``, which are int32."""
    try:
        ids = np.asarray(example.tokens)
        ids = ids if ids.size else np.zeros(0, np.int32)
        fits = ids.ndim == 1 and isinstance(example.answer, int | np.integer) and np.issubdtype(ids.dtype, np.integer)
        fits = fits and (example.mask is None or np.shape(example.mask) == ids.shape)
    except (AttributeError, ValueError):  # no example; lists of different lengths
        fits = False
    if not fits or not (np.can_cast(ids.dtype, np.int32) or -(2**31) <= ids.min() <= ids.max() < 2**31):
        raise InputError(f"example {number} holds what is no token id of int32")
    return ids


def positions_of_mask(loss_mask: Shaped[np.ndarray, "B T"], count: int) -> Int[np.ndarray, "B K"]:
    """The positions at which ``loss_mask`` is 1, in order and padded with 0s; K is ``count``, at least 1.

    Raises:
      InputError: a row has more than K ones.

    Example::

      >>> positions_of_mask(np.array([[0, 1, 0, 1], [0, 0, 1, 0]]), 3).tolist()
      [[1, 3, 0], [2, 0, 0]]
    """
    count = max(1, count)
    counts = loss_mask.sum(axis=1)
    if counts.max(initial=0) > count:
        raise InputError(f"a row has {counts.max()} loss tokens, more than {count}")
    order = np.argsort(1 - loss_mask, axis=1, kind="stable")[:, :count]
    order = np.pad(order, ((0, 0), (0, count - order.shape[1])))
    return np.where(np.arange(count) < counts[:, None], order, 0).astype(np.int32)


def bucket(length: int) -> int:
    """The padded length of a row of ``length`` tokens: 32, 48, 64, 96, 128, 192, 256, 384, ...

    Example::

      >>> [bucket(length) for length in (1, 33, 50, 100, 200)]
      [32, 48, 64, 128, 256]
    """
    T = SHORTEST
    while T < length:
        T = T // 2 * 3 if T & (T - 1) == 0 else T // 3 * 4
    return T
