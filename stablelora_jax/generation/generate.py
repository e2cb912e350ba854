"""Generate text: prompts as strings, token ids or chat messages, continued in batches until a stop condition.

``generate(model, {"params": params, "lora": adapters}, ["Once upon a time"])`` with ``model = adapted(base, spec)``, or
the base itself with ``{"params": params}``, where ``params`` may be merged ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from stablelora_jax.data.template import render
from stablelora_jax.generation.bank import Bank
from stablelora_jax.generation.decode import decoder_of, generate_tokens, token_ids
from stablelora_jax.generation.sampling import sampling
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.progress import track


class Generation(NamedTuple):
    """The continuation of one prompt."""

    prompt: tuple[int, ...]  # token ids
    tokens: tuple[int, ...]  # new token ids, the stop included
    text: str | None  # of the new tokens up to the stop; None without a tokenizer
    stop: str  # "stop_id", "stop_string" or "length"


def generate(
    model: Any,
    variables: Mapping[str, Any],
    prompts: Sequence[str | Sequence[int] | Sequence[Mapping[str, str]]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    seed: int = 0,
    batch_size: int | None = None,
    cache_dtype: DTypeLike | None = None,
    progress: bool = False,
) -> list[Generation]:
    """Continue each of ``prompts``.

    Args:
      model: a ``Decoder``, an adapted one, or one with a bank.
      variables: ``{"params": ...}``, with ``"lora"`` for an adapted model; for a bank with ``"bank"`` and ``"rows"``,
        the number of each prompt's adapter.
      prompts: strings, which the model's tokenizer reads; lists of token ids; or lists of chat messages
        ``{"role": ..., "content": ...}``, to which its chat template is applied.
      max_new_tokens: at most so many tokens for each prompt.
      temperature: 0 takes the most likely token; else tokens are sampled from ``softmax(logits / temperature)``.
      top_k: sample among the k most likely tokens.
      top_p: sample among the fewest most likely tokens whose probabilities sum to this.
      stop_ids: tokens that end a text; default those of the model's configuration.
      stop_strings: strings that end a text, and are not part of it.
      seed: of the sampling; a prompt's tokens depend on it and on the prompt's index in ``prompts`` only.
      batch_size: prompts that run together, of similar length; default all.
      cache_dtype: of the cached keys and values; default the dtype of attention.
      progress: show the progress on stderr.

    Returns:
      One :class:`Generation` for each prompt, in their order.

    Raises:
      InputError: a prompt that is empty, too long, outside the vocabulary or needs a missing tokenizer; a setting
        out of its range.
    """
    decoder, settings = decoder_of(model), sampling(temperature, top_k, top_p)
    if not isinstance(variables, Mapping) or not variables.get("params"):
        raise InputError('variables must hold "params", the parameters of the model')
    listed = isinstance(stop_strings, Sequence) and not isinstance(stop_strings, str | bytes)
    if not listed or not all(isinstance(text, str) and text for text in stop_strings):
        raise InputError(f"stop_strings must be a list of strings that are not empty, not {stop_strings!r:.80}")
    if stop_strings and decoder.tokenizer is None:
        raise InputError("stop_strings need a tokenizer, and the model has none")
    ids = encode_prompts(decoder.tokenizer, prompts)
    vocabulary = decoder.config.vocab_size
    for number, own in enumerate(ids):
        if wrong := [token for token in own if not 0 <= token < vocabulary]:
            raise InputError(f"prompt {number}: token id {wrong[0]} is outside the model's vocabulary of {vocabulary}")
    ends = token_ids(*(decoder.config.eos_token_id, "eos_token_id") if stop_ids is None else (stop_ids, "stop_ids"))
    ends += _special(decoder.tokenizer, stop_strings)
    rows = _rows(batch_size, len(ids))
    key = jax.random.key(_seed(seed))
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    results: list[Any] = [None] * len(ids)
    for start in track(range(0, len(ids), max(rows, 1)), "generate", "batches", hidden=not progress):
        chosen = order[start : start + rows]
        tokens, mask = _batch([ids[i] for i in chosen], rows)
        numbers = np.array(chosen + [0] * (rows - len(chosen)))
        finish = partial(_finish, decoder.tokenizer, ends, tuple(stop_strings))
        new, counts = generate_tokens(
            model,
            _of_rows(variables, numbers, len(ids)),
            tokens,
            mask,
            max_new_tokens=max_new_tokens,
            settings=settings,
            stop_ids=ends,
            key=key,
            rows=numbers,
            cache_dtype=cache_dtype,
            watch=partial(_stopped, finish, [ids[i] for i in chosen]) if stop_strings else None,
        )
        for i, row, count in zip(chosen, new, counts, strict=False):
            results[i] = finish(ids[i], row[:count].tolist())
    return results


def _rows(batch_size: Any, prompts: int) -> int:
    """The number of prompts that run together: no more than there are."""
    if batch_size is None:
        return prompts
    whole = isinstance(batch_size, int | np.integer) and not isinstance(batch_size, bool)
    if not whole or batch_size < 1:
        raise InputError(f"batch_size must be positive, not {batch_size!r:.60}")
    return min(int(batch_size), max(prompts, 1))


def _seed(seed: Any) -> int:
    """A seed of 64 bits, signed or not, as jax takes it."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not -(2**63) <= seed < 2**64:
        raise InputError(f"seed must be a whole number of 64 bits, not {seed!r:.60}")
    return int(seed) if seed < 2**63 else int(seed) - 2**64


def encode_prompts(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
      InputError: naming the prompt, from 0, that is empty, of no known kind, or needs what the tokenizer lacks.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        raise InputError("prompts must be a list: of strings, of lists of token ids, or of lists of chat messages")
    ids = [_encode(tokenizer, prompt, number) for number, prompt in enumerate(prompts)]
    for number, own in enumerate(ids):
        if not own:
            raise InputError(f"prompt {number} is empty: no token, not even one that begins a text")
    return ids


def _encode(tokenizer: Any, prompt: Any, number: int) -> list[int]:
    if not isinstance(prompt, str | Sequence | np.ndarray):
        raise InputError(
            f"prompt {number} must be a string, a list of token ids or of chat messages, not {prompt!r:.60}"
        )
    if not isinstance(prompt, str) and all(isinstance(token, int | np.integer) for token in prompt):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise InputError(f"prompt {number} is text, and the model has no tokenizer: give token ids")
    if isinstance(prompt, str):
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError(f"prompt {number} is no valid text: it holds bytes that are not UTF-8")
        return list(tokenizer(prompt).input_ids)
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"prompt {number} is a chat, and the model's tokenizer has no chat template: give a string, without --chat"
        )
    (text,) = render(tokenizer, [list(prompt)], [f"prompt {number}"])
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _special(tokenizer: Any, stop_strings: Sequence[str]) -> tuple[int, ...]:
    """Ids of the stop strings that are special tokens, which decoded text does not contain."""
    special = [] if tokenizer is None else zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return tuple(number for text, number in special if text in stop_strings)


def _of_rows(variables: Mapping[str, Any], numbers: np.ndarray, prompts: int) -> Mapping[str, Any]:
    """``variables`` for the prompts ``numbers``: for a bank, with the adapter of each."""
    if "rows" not in variables:
        return variables
    rows, bank = np.asarray(variables["rows"]), variables.get("bank")
    if not isinstance(bank, Bank):
        raise InputError('variables with "rows" must hold "bank", which make_bank gives')
    if rows.shape != (prompts,):
        raise InputError(f"the bank's rows of shape {rows.shape} do not name an adapter for each of {prompts} prompts")
    size = bank.size
    if not np.issubdtype(rows.dtype, np.integer):
        raise InputError(f"the bank's rows must be whole numbers, not {rows.dtype}")
    if (rows < -1).any() or (rows >= size).any():
        raise InputError(f"the bank's rows must be from -1 (the base) to {size - 1}, not {rows.tolist()!r:.60}")
    return {**variables, "rows": jax.numpy.asarray(rows[numbers])}


def _batch(ids: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask (rows, T), padded at the end; rows beyond ``ids`` are empty."""
    tokens = np.zeros((rows, max(len(own) for own in ids)), np.int64)
    mask = np.zeros(tokens.shape, bool)
    for i, own in enumerate(ids):
        tokens[i, : len(own)], mask[i, : len(own)] = own, True
    return tokens, mask


def _stopped(
    finish: Callable[[list[int], list[int]], Generation],
    ids: Sequence[list[int]],
    tokens: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Rows whose new text contains a stop string."""
    found = [
        finish(own, row[:n].tolist()).stop == "stop_string" for own, row, n in zip(ids, tokens, counts, strict=False)
    ]
    return np.array(found + [False] * (len(tokens) - len(found)))


def _finish(
    tokenizer: Any, ends: Sequence[int], stop_strings: Sequence[str], prompt: list[int], new: list[int]
) -> Generation:
    """Cut ``new`` at its first stop."""
    ended = bool(new) and new[-1] in ends
    reason = "stop_id" if ended else "length"
    if tokenizer is None:
        return Generation(tuple(prompt), tuple(new), None, reason)
    read = partial(_continuation, tokenizer, prompt)
    text = read(new[:-1] if ended else new)
    starts = [start for start in (text.find(stop) for stop in stop_strings) if start >= 0]
    if starts:
        enough = next(n for n in range(1, len(new) + 1) if any(stop in read(new[:n]) for stop in stop_strings))
        new, text, reason = new[:enough], text[: min(starts)], "stop_string"
    return Generation(tuple(prompt), tuple(new), text, reason)


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of ``new`` after ``prompt`` (by itself, some tokenizers drop its first space)."""
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, whole = str(decode(prompt)), str(decode(prompt + new))
    return whole[len(before) :] if whole.startswith(before) else str(decode(new))
