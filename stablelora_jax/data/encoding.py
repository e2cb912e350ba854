"""Tokenisation of texts: prompt and completion, truncation, chat templates.

The loss is computed on the answer alone, with the end-of-sequence token that the model needs to stop. Prompt and answer
are tokenised in one piece, since a tokenizer may merge characters across their border.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from stablelora_jax.data.chat import encode_chats
from stablelora_jax.data.chat_spans import LossOn
from stablelora_jax.data.conversation import Conversation
from stablelora_jax.data.tasks.question import Chat, Problem, Question
from stablelora_jax.data.template import render
from stablelora_jax.utils.errors import InputError

Truncate = Literal["left", "right", "error"]
AT_ONCE = 1024  # texts of one call of the tokenizer: bounds the memory, and keeps its threads busy


class Text(NamedTuple):
    """One text to train on: the loss is on ``answer``; ``id`` is for error messages."""

    prompt: str
    answer: str
    id: str
    chat: Conversation | None = None  # instead of prompt and answer, where there is a chat template


class Example(NamedTuple):
    """One tokenised text; its loss is on the tokens from position ``answer`` on, or where ``mask`` is 1."""

    tokens: Sequence[int] | np.ndarray
    answer: int
    cut: int = 0  # tokens that were dropped because the text is too long
    mask: Sequence[int] | np.ndarray | None = None  # of a chat of several turns
    lost: int = 0  # loss tokens among those that were dropped


def loss_mask(example: Example) -> np.ndarray:
    """1 on the loss tokens of ``example``, (T,) int32; nothing predicts the first token."""
    if example.mask is None:
        return (np.arange(len(example.tokens)) >= max(1, example.answer)).astype(np.int32)
    mask = np.array(example.mask, np.int32)
    mask[:1] = 0
    return mask


def training_texts(items: Iterable[Question | Problem | Chat]) -> list[Text]:
    """Each question with its right answer, each problem with its answer."""
    return [_text_of(item) for item in items]


def preference_texts(items: Sequence[Question | Problem | Chat], seed: int) -> list[Text]:
    """Two texts for each question: the right answer, then a wrong one, drawn by ``seed`` where there are several.

    Raises:
      InputError: an item that has no wrong answer.
    """
    texts, rng = [], np.random.default_rng(seed)
    for item in items:
        if not isinstance(item, Question) or len(item.choices) < 2:
            raise InputError(
                f"{item.id} has nothing to prefer its answer to: pairs come of multiple choice, or of a jsonl task of "
                "kind preference (prompt, chosen, rejected)"
            )
        wrong = [i for i in range(len(item.choices)) if i != item.label]
        chosen = (item.label, wrong[int(rng.integers(len(wrong)))])
        texts += [Text(item.prompt, item.choices[i], item.id) for i in chosen]
    return texts


def _text_of(item: Question | Problem | Chat) -> Text:
    if isinstance(item, Question):
        return Text(item.prompt, item.choices[item.label], item.id)
    return Text(item.prompt, item.answer, item.id, _conversation(item) if isinstance(item, Chat) else None)


def _conversation(item: Chat) -> Conversation:
    return Conversation(item.messages, item.tools)


def encode(
    tokenizer: Any, prompt: str, answer: str, *, end: bool, max_length: int, truncate: Truncate = "left"
) -> Example:
    """Tokenise ``prompt + answer`` in one piece; the answer begins where the prompt's own tokens stop agreeing.

    Args:
      tokenizer: a ``transformers`` tokenizer; it decides whether a text begins with a BOS token.
      prompt: the input of the model.
      answer: the expected completion.
      end: whether the end-of-sequence token belongs to the answer (in training, so that the model learns to stop).
      max_length: the maximum of tokens kept.
      truncate: the side on which a longer text loses tokens, or ``error`` to refuse it.

    Raises:
      InputError: the answer is empty, or nothing of it or of its prompt would be left, or the text is too long.
    """
    (example,) = encode_many(tokenizer, [Text(prompt, answer, "")], end=end, max_length=max_length, truncate=truncate)
    return example._replace(tokens=tuple(example.tokens))


def encode_many(
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    end: bool,
    max_length: int,
    truncate: Truncate = "left",
    chat: bool = False,
    loss_on: LossOn = "assistant",
) -> Iterator[Example]:
    """:func:`encode` for many texts, lazily and :data:`AT_ONCE` at a time.

    With ``chat`` each is :func:`templated`. Texts that are conversations (all of them or none) are then rendered whole,
    with the loss on all answers or the last, as ``loss_on`` says. Of an answer that does not fit, a conversation keeps
    what fits, perhaps nothing: ``lost`` counts it, and ``answer`` is the number of tokens where nothing is left.
    """
    start, texts = [] if chat else _start(tokenizer), iter(texts)  # a template writes its own
    close = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    done = 0
    while chunk := list(islice(texts, AT_ONCE)):
        if chat and chunk[0].chat is not None:
            yield from _encode_chats(tokenizer, chunk, done, max_length, truncate, loss_on)
            done += len(chunk)
            continue
        if chat:
            chunk = templated(tokenizer, chunk)
        given = _ids(tokenizer, [text.prompt for text in chunk])
        whole = _ids(tokenizer, [text.prompt + text.answer for text in chunk])
        for text, g, w in zip(chunk, given, whole, strict=True):
            answer = len(start) + _agreement(g, w)
            yield _cut(start + w + close, answer, max_length, truncate, text.id, alone=not text.prompt)


def templated(tokenizer: Any, texts: Sequence[Text]) -> list[Text]:
    """Each text in the tokenizer's chat template, its prompt as a user's turn.

    The prompt ends where the assistant is to speak; the answer loses the space around it. What ends its turn is the
    tokenizer's end-of-sequence token, as in the templates of Llama 3, Qwen2 and SmolLM2. A BOS is there if the template
    writes one, as when a chat is served.

    Raises:
      InputError: the tokenizer has no chat template, or it does not take a text (:mod:`stablelora_jax.data.template`).
    """
    _require_template(tokenizer)
    chats = [[{"role": "user", "content": text.prompt}] for text in texts]
    prompts = render(tokenizer, chats, [text.id or "the text" for text in texts])
    return [
        text._replace(prompt=prompt, answer=text.answer.strip()) for text, prompt in zip(texts, prompts, strict=True)
    ]


def _require_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise InputError("the tokenizer of this model has no chat template: set data.chat_template to false")


def _encode_chats(
    tokenizer: Any, texts: Sequence[Text], done: int, max_length: int, truncate: Truncate, loss_on: LossOn
) -> Iterator[Example]:
    """Conversations that come after ``done`` others, each called by its row's number."""
    _require_template(tokenizer)
    labels = [f"row {number} ({text.id})" for number, text in enumerate(texts, done + 1)]
    chats = [text.chat for text in texts if text.chat is not None]
    for encoded, label in zip(encode_chats(tokenizer, chats, labels, loss_on=loss_on), labels, strict=True):
        if encoded.missing:
            raise InputError(
                f"{label}: the chat template does not write the {' and the '.join(encoded.missing)} of the assistant: "
                "take a template that does, or leave them out of the row"
            )
        yield _cut_chat(encoded.tokens, encoded.mask, max_length, truncate, label)


def _cut_chat(tokens: list[int], mask: list[int], max_length: int, truncate: Truncate, label: str) -> Example:
    over = max(0, len(tokens) - max_length)
    _require_short(over, len(tokens), max_length, truncate, label)
    part = slice(max_length) if truncate == "right" else slice(over, None)
    kept, own = tokens[part], [0, *mask[part][1:]]
    first = own.index(1) if 1 in own else len(kept)
    return Example(kept, first, over, None if all(own[first:]) else own, sum(mask) - sum(own))


def _require_short(over: int, count: int, max_length: int, truncate: Truncate, label: str) -> None:
    if over and truncate == "error":
        raise InputError(
            f"{label} has {count} tokens, more than max_length={max_length}: raise max_length, "
            "or set data.truncate to left or right"
        )


def _start(tokenizer: Any) -> list[int]:
    return [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id][:1]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    how = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    ids: list[list[int]] = tokenizer(texts, verbose=False, **how).input_ids
    return ids


def _agreement(given: list[int], whole: list[int]) -> int:
    """The length of the common prefix."""
    if whole[: len(given)] == given:
        return len(given)
    return next((i for i, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), min(len(given), len(whole)))


def _cut(tokens: list[int], answer: int, max_length: int, truncate: Truncate, id: str, alone: bool) -> Example:
    """``alone``: there is no prompt, and what is left of the answer is learnt."""
    over, where = max(0, len(tokens) - max_length), f" of {id}" if id else ""
    _require_short(over, len(tokens), max_length, truncate, f"the text{where}")
    kept = tokens[:max_length] if truncate == "right" else tokens[over:]
    first = answer if truncate == "right" else answer - over
    first = max(first, 1 if over else 0) if alone else first
    if first >= len(kept) or first < (1 if over else 0):
        raise InputError(
            f"the answer{where}, {len(tokens) - answer} tokens, "
            f"does not fit into max_length={max_length} with its prompt"
        )
    return Example(kept, first, over)
