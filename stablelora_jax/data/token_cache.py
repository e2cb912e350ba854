"""Tokenised texts, in memory or as memory-mapped int32 arrays on disk::

    CACHE/<digest>/about.json   format, counts, checksums     CACHE/<digest>/tokens.bin    all texts, end to end
    CACHE/<digest>/lengths.bin  tokens of each text           CACHE/<digest>/answers.bin   where each text's loss begins
    CACHE/<digest>/rows.bin     the row of each text, packed into rows of ``max_length`` (``packing.first_fit``)
    CACHE/<digest>/masks.bin    of chats alone, uint8: 1 on each loss token of ``tokens``

The digest is of everything that determines the arrays: the texts themselves (so of the task, its split, its limit and
its files), the tokenizer's content, the chat template where it is used, ``max_length``, ``truncate`` and the format's
number. A directory is written under another name and renamed, so it is complete or absent; one whose sizes or checksums
are wrong is built again. Building holds one chunk of texts and the lengths in memory, never all tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablelora_jax.data.chat_spans import LossOn
from stablelora_jax.data.encoding import AT_ONCE, Example, Text, Truncate, encode_many, loss_mask
from stablelora_jax.data.packing import first_fit
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, write_whole

FORMAT = 1  # raise it when the same texts would give other arrays
CHATS = 2  # the same of texts in a chat template
TURNS = 1  # the same of whole conversations
ARRAYS = ("tokens", "lengths", "answers", "rows")
COUNTS = ("cut", "clipped", "empty")


class TokenStore(NamedTuple):
    """N tokenised texts; arrays are int32, memory-mapped where they come from a cache."""

    tokens: np.ndarray  # (sum of lengths,)
    lengths: np.ndarray  # (N,)
    answers: np.ndarray  # (N,): the position of its first loss token
    rows: np.ndarray  # (N,): the row of each text where texts are packed
    ends: np.ndarray  # (N,) int64: where each text ends in ``tokens``
    cut: int  # texts that lost tokens
    digest: str
    masks: np.ndarray | None = None  # (sum of lengths,) uint8, of chats: 1 on loss tokens; None: all from answers on
    clipped: int = 0  # texts that lost loss tokens, and have some
    empty: int = 0  # texts that were left out, for they have no loss token

    def example(self, i: int) -> Example:
        """Text number ``i``."""
        end = int(self.ends[i])
        own = slice(end - int(self.lengths[i]), end)
        return Example(self.tokens[own], int(self.answers[i]), mask=None if self.masks is None else self.masks[own])


def loss_counts(store: TokenStore) -> np.ndarray:
    """The number of loss tokens of each text, (N,)."""
    lengths = np.asarray(store.lengths)
    if store.masks is None:
        return np.asarray(lengths - np.maximum(store.answers, 1))
    counts: np.ndarray = np.add.reduceat(store.masks, store.ends - lengths, dtype=np.int32)
    return counts


class _Chunk(NamedTuple):
    """A few tokenised texts; arrays as in :class:`TokenStore`."""

    tokens: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    masks: np.ndarray
    counts: np.ndarray  # texts that are cut, clipped, empty


def digest(
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    max_length: int,
    truncate: Truncate,
    chat: bool,
    loss_on: LossOn = "assistant",
) -> str:
    """SHA-256 of everything that determines the arrays, 64 hexadecimal digits."""
    shape = {
        "format": FORMAT,
        "tokenizer": _content(tokenizer),
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer("").input_ids],
        "template": [CHATS, tokenizer.chat_template] if chat else None,
        "length": max_length,
        "truncate": truncate,
    }
    made = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for text in texts:
        messages = json.dumps([TURNS, loss_on, *text.chat]) if chat and text.chat else ""
        for part in (text.prompt, text.answer, *([messages] if messages else ())):
            coded = part.encode("utf-8", "surrogatepass")
            made.update(len(coded).to_bytes(8, "little") + coded)
    return made.hexdigest()


def tokenize_dataset(
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    max_length: int,
    truncate: Truncate = "left",
    chat: bool = False,
    loss_on: LossOn = "assistant",
    cache: str | Path | None = None,
    log_fn: Callable[[str], None] = print,
) -> TokenStore:
    """Tokenise ``texts``, each with its end-of-sequence token, or find them in the directory ``cache``.

    Raises:
      InputError: no text, one that cannot be used (``encode``), no chat template, a cache that cannot be written.
    """
    if not texts:
        raise InputError("there is no text to train on")
    directory = None if cache is None else as_path(cache, "data.cache")
    how: dict[str, Any] = {"max_length": max_length, "truncate": truncate, "chat": chat, "loss_on": loss_on}
    key, masked = digest(tokenizer, texts, **how), chat and texts[0].chat is not None
    examples = encode_many(tokenizer, texts, end=True, **how)
    if directory is None:
        parts = list(_chunks(examples))
        tokens, lengths, answers, masks = (np.concatenate([part[i] for part in parts]) for i in range(4))
        counts = _totals([part.counts for part in parts], len(lengths), max_length)
        arrays = [tokens, lengths, answers, first_fit(lengths, max_length)]
        return _store(arrays, masks if masked else None, counts, key)
    place = directory / key
    try:
        store, damage = _open(place, key)
        if store is None:
            if damage:
                log_fn(f"{place} is damaged ({damage}) and built again")
                shutil.rmtree(place)
            _write(place, examples, max_length, masked)
            store, damage = _open(place, key)
    except OSError as error:
        raise InputError(f"the token cache {place} cannot be used: {error.strerror or error}") from None
    if store is None:
        raise InputError(f"the token cache {place} was written and cannot be read: {damage}")
    return store


def _chunks(examples: Iterator[Example]) -> Iterator[_Chunk]:
    """:data:`AT_ONCE` texts at a time, without those of them that have nothing to learn."""
    while chunk := list(islice(examples, AT_ONCE)):
        kept = [example for example in chunk if example.answer < len(example.tokens)]
        counts = [sum(e.cut > 0 for e in kept), sum(e.lost > 0 for e in kept), len(chunk) - len(kept)]
        lengths = np.array([len(example.tokens) for example in kept], np.int32)
        tokens = np.fromiter((t for e in kept for t in e.tokens), np.int32, int(lengths.sum()))
        answers = np.array([example.answer for example in kept], np.int32)
        masks = np.concatenate([np.zeros(0, np.uint8), *(loss_mask(e).astype(np.uint8) for e in kept)])
        yield _Chunk(tokens, lengths, answers, masks, np.array(counts))


def _totals(counts: Sequence[np.ndarray], texts: int, max_length: int) -> list[int]:
    """The sums of ``counts`` (cut, clipped, empty) of ``texts`` texts that are kept.

    Raises:
      InputError: no text has kept its answers.
    """
    cut, clipped, empty = (int(count) for count in np.sum(counts, axis=0))
    if clipped == texts:
        raise InputError(
            f"each of the {texts + empty} texts loses answers, or a part of one, to max_length={max_length}: raise it"
        )
    return [cut, clipped, empty]


def _store(arrays: Sequence[np.ndarray], masks: np.ndarray | None, counts: Sequence[int], key: str) -> TokenStore:
    """A store of the four :data:`ARRAYS`."""
    tokens, lengths, answers, rows = arrays
    cut, clipped, empty = counts
    ends = np.cumsum(lengths, dtype=np.int64)
    return TokenStore(tokens, lengths, answers, rows, ends, cut, key, masks, clipped, empty)


def _write(place: Path, examples: Iterator[Example], max_length: int, masked: bool) -> None:
    """Build the directory under another name, then rename it; the directory of a faster process is kept."""
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = ("tokens", "answers", *(["masks"] if masked else []))
    try:
        lengths, counts = [], []
        with ExitStack() as stack:
            files = {name: stack.enter_context((partial / f"{name}.bin").open("wb")) for name in names}
            for chunk in _chunks(examples):
                for name, file in files.items():
                    getattr(chunk, name).tofile(file)
                lengths.append(chunk.lengths)
                counts.append(chunk.counts)
        every = np.concatenate(lengths)
        totals = dict(zip(COUNTS, _totals(counts, len(every), max_length), strict=True))
        every.tofile(partial / "lengths.bin")
        first_fit(every, max_length).tofile(partial / "rows.bin")
        sums = {name: _checksum(partial / f"{name}.bin") for name in (*ARRAYS, *(["masks"] if masked else []))}
        about = {"format": FORMAT, "texts": len(every), "tokens": int(every.sum()), **totals, "crc32": sums}
        write_whole(partial / "about.json", json.dumps(about, indent=2) + "\n")
        if not place.exists():
            os.rename(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(place: Path, key: str) -> tuple[TokenStore | None, str]:
    """The store in ``directory``, or None and the damage (empty where nothing is there)."""
    if not place.exists():
        return None, ""
    try:
        about = json.loads((place / "about.json").read_text())
        for name in about["crc32"]:
            if _checksum(place / f"{name}.bin") != about["crc32"][name]:
                return None, f"{name}.bin is not what was written"
        arrays = [np.memmap(place / f"{name}.bin", np.int32, mode="r") for name in ARRAYS]
        masks = np.memmap(place / "masks.bin", np.uint8, mode="r") if "masks" in about["crc32"] else None
        return _store(arrays, masks, [int(about.get(name, 0)) for name in COUNTS], key), ""
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return None, "about.json is not what was written"


def _checksum(path: Path) -> int:
    made = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made = zlib.crc32(block, made)
    return made


def _content(tokenizer: Any) -> str:
    """A digest of what a tokenizer does, whatever directory it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    else:
        state = json.loads(backend.to_str())
        content = json.dumps({name: state[name] for name in state if name not in ("truncation", "padding")})
    return hashlib.sha256(content.encode()).hexdigest()
