"""A chat as rows hold it: messages of a system, users, an assistant and its tools, checked before any template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stablelora_jax.utils.errors import InputError

FOLLOWS = {  # which roles may come before a message; "" is the beginning
    "system": ("",),
    "developer": ("",),
    "user": ("", "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one field, to transformers


class Conversation(NamedTuple):
    """The messages of a chat and the JSON schemas of its tools, as :func:`conversation` checks them."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None

    @property
    def turns(self) -> list[int]:
        """Which messages are the assistant's."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def conversation(messages: Any, tools: Any = None) -> Conversation:
    """``messages`` and ``tools`` as a chat that can be learnt.

    Raises:
      InputError: messages or tools that are none, roles out of order, a message without text (but for one that calls
        tools, and the answer of a tool), images and other content that is no text, or no message of the assistant.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"a chat is a list of messages, not {messages!r:.40}")
    before = ""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or "role" not in message:
            raise InputError(f'message {number} is {message!r:.40}: a message is {{"role": ..., "content": ...}}')
        role = message["role"]
        if not isinstance(role, str) or role not in FOLLOWS:
            raise InputError(f"message {number} has the role {role!r:.20}, which is none of {', '.join(FOLLOWS)}")
        if before not in FOLLOWS[role]:
            what = f"follows the {before}'s" if before else "is the first"
            raise InputError(f"message {number} of the {role} {what}: it may follow {_either(FOLLOWS[role])}")
        _require_content(message, number)
        before = role
    found = Conversation(tuple(messages), _tools(tools))
    if not found.turns:
        raise InputError("it has no message of the assistant: there is nothing to learn")
    return found


def _either(roles: Sequence[str]) -> str:
    *others, last = [f"the {role}'s" if role else "nothing" for role in roles]
    return f"{', '.join(others)} or {last}" if others else last


def _require_content(message: Mapping[str, Any], number: int) -> None:
    role, content = message["role"], message.get("content")
    called = role == "assistant" and _calls(message.get("tool_calls"), number)
    if content is not None and not isinstance(content, str | list | tuple):
        raise InputError(f"message {number} of the {role} has a content of {type(content).__name__}, not text")
    blocks = [content] if isinstance(content, str) else [_text_of(block, number, role) for block in content or ()]
    try:
        text = "".join(blocks)
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"message {number} of the {role} holds half of a surrogate pair, which is no text") from None
    if not text.strip() and not called and (role != "tool" or content is None):
        raise InputError(f"message {number} of the {role} has no content: leave the message or the row out")


def _text_of(block: Any, number: int, role: str) -> str:
    """The text of one block of a list of content."""
    if not isinstance(block, Mapping):
        raise InputError(f"message {number} of the {role} has a content that holds {type(block).__name__}, not text")
    if block.get("type") != "text":
        raise InputError(f"message {number} of the {role} holds {block.get('type')!r:.20}: only text can be learnt")
    if not isinstance(block.get("text"), str):
        raise InputError(f"message {number} of the {role} has a block of text without a text")
    return str(block["text"])


def _calls(calls: Any, number: int) -> bool:
    """Whether there are tool calls, which are checked."""
    if calls is None:
        return False
    if not isinstance(calls, list | tuple) or any(called_name(call) is None for call in calls):
        raise InputError(
            f'message {number} has tool_calls that are no list of {{"function": {{"name": ..., "arguments": ...}}}}'
        )
    return bool(calls)


def called_name(call: Any) -> str | None:
    """The name of the function of a tool call; None where it is none."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None


def _tools(tools: Any) -> Sequence[Mapping[str, Any]] | None:
    if tools is None or (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
        return tools or None
    raise InputError(f"tools are a list of JSON schemas, not {tools!r:.40}")
