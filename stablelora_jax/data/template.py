"""Chats as text, by the tokenizer's chat template, which may be a stranger's: it runs elsewhere, within limits.

A template is a program. It is rendered as ``tokenizer.apply_chat_template`` renders it, by transformers, but in a
process of its own (``template_worker.py``) with a limit of time, memory and length. That process starts with the first
chat, serves all others, and ends with this one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stablelora_jax.utils.errors import InputError, brief

AT_ONCE = 128  # texts of a request, which share its limit of time
WORKER = Path(__file__).with_name("template_worker.py")
Chat = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # of characters: from, to

_lock = threading.Lock()
_running: dict[int, Any] = {}  # by this process's number, since a fork must not share it


class View(NamedTuple):
    """One way to render a chat: its first ``messages``, and ``how`` the text ends.

    ``whole``: with the last of them. ``prompt``: with what begins the assistant's turn. ``inside``: within the last
    message. ``marked``: as ``whole``, with the spans that the template marks by ``{% generation %}``.
    """

    messages: int
    how: Literal["whole", "prompt", "inside", "marked"]


class Asked(NamedTuple):
    """A chat, and the views of it that are wanted."""

    messages: Chat
    tools: Sequence[Mapping[str, Any]] | None
    views: Sequence[View]


class Rendering(NamedTuple):
    """The text of a view, and the marked spans of it (none unless the view is ``marked``)."""

    text: str
    spans: tuple[Span, ...]


def render(
    tokenizer: Any, chats: Sequence[Chat], labels: Sequence[str], *, continue_final_message: bool = False
) -> list[str]:
    """The text of each of ``chats``, up to where the assistant is to speak.

    Args:
      tokenizer: of ``transformers``, with a chat template.
      chats: lists of messages ``{"role": ..., "content": ...}``, each as it is.
      labels: what each chat is called in an error.
      continue_final_message: end within the last message, instead of with what begins the assistant's turn.

    Raises:
      InputError: there is no template, or it does not take a chat: it raises, never ends, or needs too much memory.
    """
    how: Literal["inside", "prompt"] = "inside" if continue_final_message else "prompt"
    asked = [Asked(chat, None, [View(len(chat), how)]) for chat in chats]
    return [rendering.text for (rendering,) in render_views(tokenizer, asked, labels)]


def render_views(tokenizer: Any, chats: Sequence[Asked], labels: Sequence[str]) -> list[list[Rendering]]:
    """The views of each of ``chats``; arguments and errors are those of :func:`render`.

    Chats with tools use the template ``tool_use`` where a tokenizer has several.
    """
    found: list[list[Rendering]] = []
    for start, end in _requests(chats):
        some = [_plain_chat(chat, label) for chat, label in zip(chats[start:end], labels[start:end], strict=True)]
        kinds = {bool(chat["tools"]) for chat in some}
        templates = {"tools" if tools else "plain": template_of(tokenizer, tools) for tools in kinds}
        request = {"templates": templates, "variables": dict(tokenizer.special_tokens_map)}
        answer = _ask({**request, "chats": some})
        if "ended" in answer and len(some) > 1:  # which of them it was, or whether all were merely slow
            answer = _one_by_one(request, some)
        if "error" in answer:
            reason = " ".join(str(answer["error"]).split())[:200]
            raise InputError(f"{labels[start + answer['at']]}: the chat template does not take it ({reason})")
        found += [
            [Rendering(text, tuple((a, b) for a, b in spans)) for text, spans in views] for views in answer["chats"]
        ]
    return found


def _one_by_one(request: Mapping[str, Any], chats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer to ``request`` for each of ``chats`` alone, put together, or the first error."""
    found = []
    for at, chat in enumerate(chats):
        answer = _ask({**request, "chats": [chat]})
        if "error" in answer:
            return {**answer, "at": at}
        found += answer["chats"]
    return {"chats": found}


def _requests(chats: Sequence[Asked]) -> Iterator[tuple[int, int]]:
    """From which to which chat a request goes: some :data:`AT_ONCE` texts each."""
    start, texts = 0, 0
    for at, chat in enumerate(chats):
        if texts and texts + len(chat.views) > AT_ONCE:
            yield start, at
            start, texts = at, 0
        texts += len(chat.views)
    if texts:
        yield start, len(chats)


def template_of(tokenizer: Any, tools: bool = False) -> str:
    """The chat template of ``tokenizer``: of several the default, or with ``tools`` the one for them.

    Raises:
      InputError: there is none, or none is meant.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer of this model has no chat template")
    try:
        template = tokenizer.get_chat_template(tools=[{}] if tools else None)
    except ValueError as error:  # several, and none is the default
        raise InputError(f"the chat template of the tokenizer cannot be used: {brief(error)}") from None
    if not isinstance(template, str):
        raise InputError(f"the chat template of the tokenizer is {type(template).__name__}, not text")
    return template


def _plain_chat(chat: Asked, label: str) -> dict[str, Any]:
    messages = [_plain(message, label) for message in chat.messages]
    return {"messages": messages, "tools": chat.tools or None, "views": [list(view) for view in chat.views]}


def _plain(message: Any, label: str) -> dict[str, Any]:
    """A message without keys that are None, as ``apply_chat_template`` takes it."""
    if not isinstance(message, Mapping):
        raise InputError(f"a message of {label} must be a mapping with role and content, not {message!r:.60}")
    return {str(key): value for key, value in message.items() if value is not None}


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        line = json.dumps(request) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        return {"at": 0, "error": f"a message holds what is no JSON: {brief(error)}"}
    with _lock:
        process = _process()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        except BaseException:  # interrupted in the middle: what comes next would be the answer to this
            _end(process)
            raise
        if answer.endswith("\n"):
            found: dict[str, Any] = json.loads(answer)
            return found
        _end(process)
    return {"at": 0, "error": "it takes more than 5 seconds, or too much memory", "ended": True}


def _process() -> Any:
    process: Any = _running.get(os.getpid())
    if process is None or process.poll() is not None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-I", str(WORKER)]
        process = subprocess.Popen(command, **pipes, text=True, encoding="utf-8", start_new_session=True)
        _running[os.getpid()] = process
        process.stdin.write(json.dumps([path for path in sys.path if path]) + "\n")
    return process


def _end(process: Any) -> None:
    """Let go of the process, whatever it is doing."""
    _running.pop(os.getpid(), None)
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()
    process.wait()


@atexit.register
def _end_all() -> None:
    if process := _running.get(os.getpid()):
        _end(process)
