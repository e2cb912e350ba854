"""The process in which chat templates run: they are programs of strangers. Started by ``template.py``, never imported.

The first line of the standard input is the list ``sys.path``. Each further line is a request, answered by one line.
A view is the number of messages and how the text ends (``template.View``)::

    {"templates": {"plain": "..."}, "variables": {...}, "chats": [{"messages": [...], "tools": null, "views": [...]}]}
    {"chats": [[["text", [[0, 4]]]]]}    or    {"at": 0, "error": "TemplateError: ..."}

Transformers renders, in its own sandbox. A request that takes longer than :data:`SECONDS` ends this process by a signal
that no computation can hold up; memory and the length of a text are limited, too.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

SECONDS = 5.0
MEMORY = 2 << 30  # bytes of address space, of which Python and transformers take a tenth
LONGEST = 1 << 24  # characters of a text


def main() -> None:
    """Answer until the standard input ends, with the process that started this one."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that a library prints is an answer
    sys.path[:] = json.loads(sys.stdin.readline())
    for heavy in ("torch", "tensorflow", "jax", "flax"):
        sys.modules[heavy] = None  # type: ignore[assignment]
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(ValueError, OSError):  # a system without this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        answer = respond(render_jinja_template, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def respond(render: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request: a text and its marked spans for each view of each chat."""
    found = []
    for at, chat in enumerate(request["chats"]):
        template = request["templates"]["tools" if chat["tools"] else "plain"]
        try:
            found.append([view_of(render, template, chat, view, request["variables"]) for view in chat["views"]])
        except Exception as error:  # a template raises whatever it likes
            return {"at": at, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"chats": found}


def view_of(
    render: Callable[..., Any], template: str, chat: dict[str, Any], view: list[Any], variables: dict[str, Any]
) -> tuple[str, list[Any]]:
    """The text of one view, and its spans."""
    count, how = view
    ends = {
        "continue_final_message": how == "inside",
        "add_generation_prompt": how == "prompt",
        "return_assistant_tokens_mask": how == "marked",
    }
    messages, tools = chat["messages"][:count], chat["tools"]
    (text,), spans = render([messages], tools=tools, chat_template=template, **ends, **variables)
    if len(text) > LONGEST:
        raise ValueError(f"it makes a text of more than {LONGEST} characters")
    return text, spans[0] if spans else []


if __name__ == "__main__":
    main()
