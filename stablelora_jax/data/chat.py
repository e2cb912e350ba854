"""Chats as tokens and a loss mask: the loss is on what the assistant says, with the token that ends its turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stablelora_jax.data.chat_spans import LossOn, Rendered, rendered_chats
from stablelora_jax.data.conversation import Conversation, conversation
from stablelora_jax.data.template import Span
from stablelora_jax.utils.errors import InputError


class EncodedChat(NamedTuple):
    """A chat as tokens, and what of the turns that are learnt the template leaves out."""

    tokens: list[int]
    mask: list[int]  # 1 on loss tokens
    missing: tuple[str, ...]


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    loss_on: LossOn = "assistant",
) -> tuple[list[int], list[int]]:
    """The tokens of a chat in the tokenizer's chat template, and the mask of those that carry loss.

    The text is tokenised once, as a whole and without special tokens but those that the template writes. A token that
    holds any character of what the assistant says is a loss token (:mod:`stablelora_jax.data.chat_spans`).

    What the template does not write carries no loss, such as the reasoning of a turn.

    Args:
      tokenizer: a fast ``transformers`` tokenizer with a chat template.
      messages: ``{"role": "system" | "user" | "assistant" | "tool", "content": ...}``, with ``tool_calls`` and
        reasoning as the template takes them.
      tools: JSON schemas of the tools that the assistant may call.
      loss_on: ``assistant``: on all turns of the assistant; ``last``: on the last.

    Returns:
      ``(token_ids, loss_mask)``, of the same length; the mask is 1 on loss tokens, else 0.

    Raises:
      InputError: messages that are none, no turn of the assistant, a template that does not take them or whose turns
        cannot be told apart.
    """
    (encoded,) = encode_chats(tokenizer, [conversation(messages, tools)], ["the chat"], loss_on=loss_on)
    return encoded.tokens, encoded.mask


def encode_chats(
    tokenizer: Any, chats: Sequence[Conversation], labels: Sequence[str], *, loss_on: LossOn
) -> list[EncodedChat]:
    """:func:`encode_chat` for many chats, which are called ``labels`` in errors."""
    if loss_on not in ("assistant", "last"):
        raise InputError(f"loss_on must be assistant or last, not {loss_on!r:.40}")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("a chat needs a fast tokenizer, which says from where each token is: use tokenizer.json")
    rendered = rendered_chats(tokenizer, chats, labels, loss_on)
    how = {"return_attention_mask": False, "return_token_type_ids": False, "return_offsets_mapping": True}
    made = tokenizer([chat.text for chat in rendered], add_special_tokens=False, verbose=False, **how)
    every = zip(made.input_ids, made.offset_mapping, rendered, strict=True)
    return [EncodedChat(ids, _mask(offsets, chat), chat.missing) for ids, offsets, chat in every]


def _mask(offsets: Sequence[Span], chat: Rendered) -> list[int]:
    """1 on each token that overlaps a span, as ``apply_chat_template(return_assistant_tokens_mask=True)`` gives it."""
    mask, spans, at = [0] * len(offsets), chat.spans, 0
    for i, (start, end) in enumerate(offsets):
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        if at == len(spans):
            break
        mask[i] = int(end > spans[at][0])
    return mask
