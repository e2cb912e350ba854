"""Tokenised texts, in memory or as memory-mapped int32 arrays on disk::

    CACHE/<digest>/about.json   format, counts, checksums     CACHE/<digest>/tokens.bin    all texts, end to end
    CACHE/<digest>/lengths.bin  tokens of each text           CACHE/<digest>/answers.bin   where each text's loss begins
    CACHE/<digest>/rows.bin     the row of each text, packed into rows of ``max_length`` (``packing.first_fit``)

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
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablelora_jax.data.encoding import AT_ONCE, Example, Text, Truncate, encode_many
from stablelora_jax.data.packing import first_fit
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, write_whole

FORMAT = 1  # raise it when the same texts would give other arrays
CHATS = 2  # the same of texts in a chat template
ARRAYS = ("tokens", "lengths", "answers", "rows")


class TokenStore(NamedTuple):
    """N tokenised texts; arrays are int32, memory-mapped where they come from a cache."""

    tokens: np.ndarray  # (sum of lengths,)
    lengths: np.ndarray  # (N,)
    answers: np.ndarray  # (N,): the position of its first loss token
    rows: np.ndarray  # (N,): the row of each text where texts are packed
    ends: np.ndarray  # (N,) int64: where each text ends in ``tokens``
    cut: int  # texts that lost tokens
    digest: str

    def example(self, i: int) -> Example:
        """Text number ``i``."""
        end = int(self.ends[i])
        return Example(self.tokens[end - int(self.lengths[i]) : end], int(self.answers[i]))


class _Chunk(NamedTuple):
    """A few tokenised texts; arrays as in :class:`TokenStore`."""

    tokens: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    cut: int


def digest(tokenizer: Any, texts: Iterable[Text], *, max_length: int, truncate: Truncate, chat: bool) -> str:
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
        messages = json.dumps(text.messages) if chat and text.messages else ""
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
    key = digest(tokenizer, texts, max_length=max_length, truncate=truncate, chat=chat)
    examples = encode_many(tokenizer, texts, end=True, max_length=max_length, truncate=truncate, chat=chat)
    if directory is None:
        parts = list(_chunks(examples))
        tokens, lengths, answers = (np.concatenate([part[i] for part in parts]) for i in range(3))
        rows = first_fit(lengths, max_length)
        return _store([tokens, lengths, answers, rows], sum(part.cut for part in parts), key)
    place = directory / key
    try:
        store, damage = _open(place, key)
        if store is None:
            if damage:
                log_fn(f"{place} is damaged ({damage}) and built again")
                shutil.rmtree(place)
            _write(place, examples, max_length)
            store, damage = _open(place, key)
    except OSError as error:
        raise InputError(f"the token cache {place} cannot be used: {error.strerror or error}") from None
    if store is None:
        raise InputError(f"the token cache {place} was written and cannot be read: {damage}")
    return store


def _chunks(examples: Iterator[Example]) -> Iterator[_Chunk]:
    """:data:`AT_ONCE` texts at a time."""
    while chunk := list(islice(examples, AT_ONCE)):
        lengths = np.array([len(example.tokens) for example in chunk], np.int32)
        tokens = np.fromiter((t for e in chunk for t in e.tokens), np.int32, int(lengths.sum()))
        answers = np.array([example.answer for example in chunk], np.int32)
        yield _Chunk(tokens, lengths, answers, sum(example.cut > 0 for example in chunk))


def _store(arrays: Sequence[np.ndarray], cut: int, key: str) -> TokenStore:
    """A store of the four :data:`ARRAYS`."""
    tokens, lengths, answers, rows = arrays
    return TokenStore(tokens, lengths, answers, rows, np.cumsum(lengths, dtype=np.int64), cut, key)


def _write(place: Path, examples: Iterator[Example], max_length: int) -> None:
    """Build the directory under another name, then rename it; the directory of a faster process is kept."""
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        lengths, cut = [], 0
        with (partial / "tokens.bin").open("wb") as tokens, (partial / "answers.bin").open("wb") as answers:
            for chunk in _chunks(examples):
                chunk.tokens.tofile(tokens)
                chunk.answers.tofile(answers)
                lengths.append(chunk.lengths)
                cut += chunk.cut
        every = np.concatenate(lengths)
        every.tofile(partial / "lengths.bin")
        first_fit(every, max_length).tofile(partial / "rows.bin")
        sums = {name: _checksum(partial / f"{name}.bin") for name in ARRAYS}
        about = {"format": FORMAT, "texts": len(every), "tokens": int(every.sum()), "cut": cut, "crc32": sums}
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
        for name in ARRAYS:
            if _checksum(place / f"{name}.bin") != about["crc32"][name]:
                return None, f"{name}.bin is not what was written"
        arrays = [np.memmap(place / f"{name}.bin", np.int32, mode="r") for name in ARRAYS]
        return _store(arrays, int(about["cut"]), key), ""
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
