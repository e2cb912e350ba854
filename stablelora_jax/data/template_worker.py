"""The process in which chat templates run: they are programs of strangers. Started by ``template.py``, never imported.

The first line of the standard input is the list ``sys.path``. Each further line is a request, answered by one line::

    {"template": "...", "variables": {...}, "chats": [[{"role": ..., "content": ...}]], "continue_final_message": false}
    {"texts": ["..."]}    or    {"at": 0, "error": "TemplateError: ..."}

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
    """The answer to a request."""
    texts = []
    for at, chat in enumerate(request["chats"]):
        try:
            inside = request["continue_final_message"]
            how = {"continue_final_message": inside, "add_generation_prompt": not inside, **request["variables"]}
            (text,), _ = render([chat], chat_template=request["template"], **how)
        except Exception as error:  # a template raises whatever it likes
            return {"at": at, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        if len(text) > LONGEST:
            return {"at": at, "error": f"it makes a text of more than {LONGEST} characters"}
        texts.append(text)
    return {"texts": texts}


if __name__ == "__main__":
    main()
