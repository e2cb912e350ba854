"""Which characters of a rendered chat the assistant says: by the template's marks, or by comparing renderings.

A template that marks the assistant's text by ``{% generation %}`` says it itself. Of any other, the assistant's turn is
what a rendering that ends with the turn has beyond the one that ends where the assistant is to speak. Both must be a
prefix of the whole chat's text: otherwise the text of a turn depends on what comes later, and what would be learnt is
not what is served. Two departures are known and exact: a text that ends with the end-of-sequence token whatever its
last message is (Phi-3), and an empty thinking block that is left out of earlier turns (Qwen3). All else is refused.

A turn holds what ends it, with the line break behind it, and a thinking block that the template opens before the
assistant speaks (Qwen3.5), as in the training templates of TRL 1.16. It holds no header and no space at its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any, Literal, NamedTuple

from stablelora_jax.data.conversation import REASONING, Conversation, called_name
from stablelora_jax.data.template import Asked, Rendering, Span, View, render_views, template_of
from stablelora_jax.utils.errors import InputError

LossOn = Literal["assistant", "last"]
MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
OPENED = re.compile(r"<think>\s*(</think>\s*)?$")  # a thinking block at the end of what begins a turn
EMPTY = re.compile(r"<think>\s*</think>\s*")
WAYS = "put {% generation %} and {% endgeneration %} around the assistant's text in the template"


class Rendered(NamedTuple):
    """The text of a chat, the spans of it that carry loss, in order, and what of those turns is not in them."""

    text: str
    spans: list[Span]
    missing: tuple[str, ...]  # "tool calls", "reasoning": what the template does not write


class _Unfit(ValueError):
    """What a template does that keeps its turns from being found, and the way out."""


def rendered_chats(
    tokenizer: Any, chats: Sequence[Conversation], labels: Sequence[str], loss_on: LossOn
) -> list[Rendered]:
    """Each chat by the template of ``tokenizer``, with the spans of all assistant's turns or of the last.

    Raises:
      InputError: no template, or one that does not take a chat, ends no turn, or neither marks nor keeps turns.
    """
    template = f"the chat template of {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
    marked = [bool(MARKS.search(template_of(tokenizer, bool(chat.tools)))) for chat in chats]
    asked = [Asked(*chat, _views(chat, own, loss_on)) for chat, own in zip(chats, marked, strict=True)]
    found = []
    for chat, own, views, label in zip(chats, marked, render_views(tokenizer, asked, labels), labels, strict=True):
        turns = chat.turns[-1:] if loss_on == "last" else chat.turns
        try:
            spans = _marked(views, loss_on) if own else _compared(chat, turns, views, tokenizer.eos_token or "")
            _require_text(chat, views[0].text)
        except _Unfit as error:
            raise InputError(f"{label}: {template} {error}") from None
        said = "".join(views[0].text[start:end] for start, end in spans)
        found.append(Rendered(views[0].text, spans, _missing([chat.messages[i] for i in turns], said)))
    for chat, label in _examples(chats, marked, labels):
        if not _ending(tokenizer, chat, label).strip():
            raise InputError(
                f"{label}: {template} ends no turn of the assistant, so that it would never learn to stop: write the "
                "end-of-sequence token behind the assistant's text in the template"
            )
    return found


def _views(chat: Conversation, marked: bool, loss_on: LossOn) -> list[View]:
    count, turns = len(chat.messages), chat.turns
    if marked:
        until = [View(turns[-1], "marked"), View(turns[-1] + 1, "marked")]
        return [View(count, "marked"), *(until if loss_on == "last" else [])]
    tooled = any(message["role"] == "tool" for message in chat.messages)
    begun = [View(turns[0], "whole"), View(turns[0], "prompt")] if tooled else []
    own = turns[-1:] if loss_on == "last" else turns
    return [View(count, "whole"), *(view for i in own for view in (View(i, "prompt"), View(i + 1, "whole"))), *begun]


def _marked(views: Sequence[Rendering], loss_on: LossOn) -> list[Span]:
    spans = [span for span in views[0].spans if span[0] < span[1]]
    if loss_on == "assistant":
        return spans
    before, until = (sum(start < end for start, end in view.spans) for view in views[1:])
    return spans[before:until]


def _compared(chat: Conversation, turns: Sequence[int], views: Sequence[Rendering], eos: str) -> list[Span]:
    whole, *others = [view.text for view in views]
    n, spans = 2 * len(turns), []
    begins = _beyond(*others[n:]) if others[n:] else ""
    for i, prompt, until in zip(turns, others[:n:2], others[1:n:2], strict=True):
        start, end = _turn(whole, prompt, until, eos, i)
        if chat.messages[i - 1]["role"] == "tool" and not prompt.endswith(begins):
            raise _Unfit(f"does not say where message {i + 1} begins, behind what a tool answers: {WAYS}")
        spans.append((start, len(whole[:end].rstrip(" "))))
    return spans


def _beyond(text: str, longer: str) -> str:
    """What ``longer`` has behind their common beginning."""
    return longer[len(commonprefix([text, longer])) :]


def _turn(whole: str, prompt: str, until: str, eos: str, i: int) -> Span:
    """From where to where message ``i`` goes in ``whole``, without its header.

    ``prompt`` ends where it is to begin, ``until`` with its end.
    """
    opened = OPENED.search(prompt)
    header = prompt[: opened.start()] if opened else prompt
    if not until.startswith(prompt) and not (opened and until[len(header) :].startswith("<think>")):
        raise _Unfit(
            f"begins message {i + 1} otherwise than where the assistant is to speak, so that what is learnt would not "
            f"be what is served: {WAYS}"
        )
    if _within(whole, until) is None and eos and until.endswith(eos) and whole.endswith(eos):
        until = until.removesuffix(eos)
    start, end = _within(whole, header), _within(whole, until)
    if start is not None and end is not None:
        return start, end
    raise _Unfit(
        f"does not keep the text up to message {i + 1} as what comes after it begins, as one that drops earlier "
        f"thinking does not: learn the last answer alone (loss_on=last), or {WAYS}"
    )


def _within(whole: str, text: str) -> int | None:
    """Where ``text``, which begins ``whole`` but for empty thinking blocks that ``whole`` leaves out, ends in it."""
    at = 0
    while not whole.startswith(text, at):
        same = len(commonprefix([whole[at:], text]))
        block = next((found for found in EMPTY.finditer(text) if found.start() <= same < found.end()), None)
        if block is None:
            return None
        at, text = at + block.start(), text[block.end() :]
    return at + len(text)


def _require_text(chat: Conversation, text: str) -> None:
    """That no list of content is written as Python shows it."""
    for i, message in enumerate(chat.messages):
        content = message.get("content")
        if isinstance(content, list | tuple) and content and repr(list(content)) in text:
            raise _Unfit(f"writes the list of content of message {i + 1} as it is: give the text alone, as a string")


def _missing(messages: Sequence[Mapping[str, Any]], said: str) -> tuple[str, ...]:
    """What of ``messages`` is not in ``said``."""
    called = [str(called_name(call)) for message in messages for call in message.get("tool_calls") or ()]
    thought = [str(message[name]) for message in messages for name in REASONING if message.get(name)]
    absent = {
        "tool calls": any(name not in said for name in called),
        "reasoning": any(text.strip() not in said for text in thought),
    }
    return tuple(name for name, is_absent in absent.items() if is_absent)


def _examples(
    chats: Sequence[Conversation], marked: Sequence[bool], labels: Sequence[str]
) -> list[tuple[Conversation, str]]:
    """One chat for each template that marks nothing."""
    unmarked = [(chat, label) for chat, own, label in zip(chats, marked, labels, strict=True) if not own]
    return list({bool(chat.tools): (chat, label) for chat, label in reversed(unmarked)}.values())


def _ending(tokenizer: Any, chat: Conversation, label: str) -> str:
    """What the template writes behind the assistant's text: what two answers of one letter end with."""
    first = chat.turns[0]
    listed = not isinstance(chat.messages[first].get("content") or "", str)
    contents: list[Any] = [[{"type": "text", "text": text}] if listed else text for text in "xy"]
    answers = [[*chat.messages[:first], {"role": "assistant", "content": content}] for content in contents]
    asked = [Asked(messages, chat.tools, [View(first + 1, "whole")]) for messages in answers]
    x, y = (rendering.text[::-1] for (rendering,) in render_views(tokenizer, asked, [label] * 2))
    return commonprefix([x, y])[::-1]
