"""How the rows of a run become tokens: counts, lengths, truncation, padding, and samples with loss tokens marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from stablelora_jax.config.run import RunConfig
from stablelora_jax.data import Example, TokenStore
from stablelora_jax.data.encoding import loss_mask
from stablelora_jax.data.tasks import load_questions
from stablelora_jax.data.token_cache import loss_counts
from stablelora_jax.models.pretrained.load import base_directory, pretrained_tokenizer
from stablelora_jax.runs.training_data import load_training_data, with_kind, with_steps
from stablelora_jax.runs.validation import make_validation_set

Marks = tuple[str, str]
BRACKETS, GREEN = ("[", "]"), ("\x1b[1;32m", "\x1b[0m")


def data_summary(
    config: RunConfig, samples: int, *, marks: Marks = BRACKETS, log_fn: Callable[[str], None] = print
) -> None:
    """Print the summary of the training split and, where the run evaluates, of the validation split.

    Args:
      config: of the run; of its model, only the tokenizer is loaded.
      samples: rows of each split that are printed in full.
      marks: what is printed before and after the loss tokens.
      log_fn: takes each line.

    Raises:
      InputError: as a training run raises it for the same data.
    """
    config = with_kind(config, log_fn)
    tokenizer = pretrained_tokenizer(config.model.path or base_directory())
    loader = load_training_data(config, tokenizer, log_fn)
    with_steps(config, loader, log_fn)
    store = loader.store
    shown = [store.example(i) for i in range(min(samples, len(store.lengths)))]
    _print_split("train", _lengths(store), store.cut, config.max_length, log_fn)
    _print_samples("train", tokenizer, shown, marks, log_fn)
    if config.evaluate:
        examples = make_validation_set(config, tokenizer, load_questions(config.task, "validation")).examples
        lengths = np.array([(len(e.tokens), loss_mask(e).sum()) for e in examples])
        _print_split("validation", lengths, sum(e.cut > 0 for e in examples), config.max_length, log_fn)
        _print_samples("validation", tokenizer, examples[:samples], marks, log_fn)


def _lengths(store: TokenStore) -> np.ndarray:
    """(N, 2): tokens and loss tokens of each text."""
    return np.stack([store.lengths, loss_counts(store)], axis=1)


def _print_split(split: str, lengths: np.ndarray, cut: int, most: int, log_fn: Callable[[str], None]) -> None:
    texts = [
        f"{title} {low:.0f} / {middle:.0f} / {high:.0f}"
        for title, (low, middle, high) in zip(
            ("tokens", "loss tokens"), np.quantile(lengths, [0, 0.5, 1], axis=0).T, strict=True
        )
    ]
    log_fn(
        f"\n{split}: {len(lengths)} rows; min / median / max: {', '.join(texts)}; "
        f"{cut} rows truncated to max_length={most}"
    )


def _print_samples(
    split: str, tokenizer: Any, examples: Sequence[Example], marks: Marks, log_fn: Callable[[str], None]
) -> None:
    for number, example in enumerate(examples, 1):
        log_fn(f"\n{split} row {number}, loss tokens marked {_shown_marks(marks)}:")
        log_fn(marked(tokenizer, example, marks))


def _shown_marks(marks: Marks) -> str:
    return f"{marks[0]}so{marks[1]}"


def marked(tokenizer: Any, example: Example, marks: Marks = BRACKETS) -> str:
    """The text of an example, special tokens included, with its loss tokens between ``marks``."""
    tokens, mask = [int(token) for token in example.tokens], loss_mask(example)

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(tokens)]
    shown, before = "", ""
    for start, end in pairwise(edges):
        whole = text(tokens[:end])  # by itself, some tokenizers drop a text's first space
        part = _printable(whole[len(before) :] if whole.startswith(before) else text(tokens[start:end]))
        shown, before = shown + (f"{marks[0]}{part}{marks[1]}" if mask[start:end].any() else part), whole
    return shown


def _printable(text: str) -> str:
    """``text`` without characters that control a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
