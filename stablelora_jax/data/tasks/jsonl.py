"""Any rows: multiple choice, prompt and completion, or chat messages, from a file or the hub, columns by name.

``fields`` says which column is what; a column that is not named there has the name itself. Rows of ShareGPT and
of Alpaca are read as chats and as completions (``schemas.py``).

    choice       prompt, choices (list of strings), label (index from 0)                    -> Question
    completion   prompt, completion, target (optional: what the answer is judged by)        -> Problem
    preference   prompt, chosen, rejected                                                   -> Question of two choices
    chat         messages: [{"role", "content"}] (data/conversation.py); tools (optional): JSON schemas      -> Chat
    text         text: all of it is learnt                                                        -> Problem

Messages stay as they are, for the model's chat template; beside them, joined by blank lines, are the last answer of the
assistant and all before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from stablelora_jax.data.conversation import conversation
from stablelora_jax.data.tasks import rows
from stablelora_jax.data.tasks.question import Chat, Problem, Question
from stablelora_jax.data.tasks.schemas import chat_row, completion_row, messages_of, tools_of
from stablelora_jax.utils.errors import InputError

NEEDED = {
    "choice": ("prompt", "choices", "label"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "text": ("text",),
}
OFTEN = {
    "prompt": ("instruction", "question", "input", "query", "text"),
    "completion": ("output", "response", "answer", "completion", "target"),
    "choices": ("options", "endings"),
    "label": ("answer", "gold"),
    "messages": ("conversations", "conversation", "chat", "dialog"),
    "chosen": ("preferred", "accepted", "response_chosen"),
    "rejected": ("dispreferred", "response_rejected"),
    "target": (),
    "tools": (),
    "text": ("content", "document"),
    "id": (),
}
Kind = Literal["choice", "completion", "chat", "preference", "text"]
NAMES = {
    "choice": ("prompt", "choices", "label", "id"),
    "completion": ("prompt", "completion", "target", "id"),
    "chat": ("messages", "tools", "id"),
    "preference": ("prompt", "chosen", "rejected", "id"),
    "text": ("text", "id"),
}


def items(
    kind: Kind, split: str, path: str | None, hub: str | None, config: str | None, fields: Mapping[str, str]
) -> list[Question] | list[Problem] | list[Chat]:
    """The rows of one split.

    Args:
      kind: what a row is.
      split: ``train`` or ``validation``, or what the hub calls its split.
      path: a directory that holds ``SPLIT.jsonl`` (or ``.jsonl.gz``).
      hub: a data set on the hub, where there is no ``path``.
      config: of the hub's data set.
      fields: column of each name, where it has another.

    Raises:
      InputError: neither or both of path and hub, an unknown name in ``fields``, or what ``rows.load`` raises.
    """
    if (path is None) == (hub is None):
        raise InputError("task jsonl needs either task.path or task.hub")
    if unknown := sorted(set(fields) - set(NAMES[kind])):
        names = ", ".join(NAMES[kind])
        raise InputError(
            f"task.fields.{unknown[0]} is not read for kind {kind}: task.fields maps {names} to columns of the file"
        )
    make: Any = {
        "choice": _question,
        "completion": _completion,
        "chat": _chat,
        "preference": _preference,
        "text": _plain,
    }[kind]
    found = rows.hub_rows(rows.Hub(hub, config), split) if hub else rows.local_split(Path(str(path)), split)
    return rows.parse(*found, split, lambda row, name: make(_named(row, kind, fields), name))


def _named(row: Mapping[str, Any], kind: Kind, fields: Mapping[str, str]) -> dict[str, Any]:
    row = completion_row(row, fields) if kind == "completion" else chat_row(row, fields) if kind == "chat" else row
    columns = {name: fields.get(name, name) for name in NAMES[kind]}
    absent = [
        name for name, column in columns.items() if column not in row and (name in fields or name in NEEDED[kind])
    ]
    if absent:
        there = ", ".join(map(str, row))
        said = f"there is no column {columns[absent[0]]!r}; the columns are {there}. "
        if other := next((k for k in NEEDED if k != kind and not fields and set(NEEDED[k]) <= set(row)), None):
            raise rows.Unsupported(f"{said}These are columns of task.kind={other} (here: {kind})")
        mapped = {**fields, **{name: _guess(name, row) for name in absent}}
        guess = ", ".join(f"{name}: {column}" for name, column in mapped.items())
        raise rows.Unsupported(f"{said}Say which is which with task.fields={{{guess}}}")
    return {name: row[column] for name, column in columns.items() if column in row}


def _guess(name: str, row: Mapping[str, Any]) -> str:
    """The column that is probably meant: of Alpaca, Dolly, ShareGPT or the like."""
    return next((column for column in OFTEN[name] if column in row), "COLUMN")


def _question(row: Mapping[str, Any], name: str) -> Question:
    return Question(rows.text(row, "prompt"), *rows.choices(row["choices"], row["label"]), str(row.get("id", name)))


def _completion(row: Mapping[str, Any], name: str) -> Problem:
    target = row.get("target")
    return Problem(
        rows.text(row, "prompt").rstrip(),
        _apart(rows.text(row, "completion"), row["prompt"]),
        None if target is None else str(target),
        str(row.get("id", name)),
    )


def _preference(row: Mapping[str, Any], name: str) -> Question:
    prompt = rows.text(row, "prompt").rstrip()
    pair = tuple(_apart(rows.text(row, side), row["prompt"]) for side in ("chosen", "rejected"))
    if pair[0] == pair[1]:
        raise rows.Unsupported("chosen and rejected are the same: leave the row out")
    return Question(prompt, pair, 0, str(row.get("id", name)))


def _plain(row: Mapping[str, Any], name: str) -> Problem:
    return Problem("", rows.text(row, "text"), None, str(row.get("id", name)))


def _chat(row: Mapping[str, Any], name: str) -> Chat:
    try:
        messages, tools = conversation(messages_of(row["messages"]), tools_of(row.get("tools")))
    except InputError as error:
        raise rows.Unsupported(str(error)) from None
    texts = [_text(message) for message in messages]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    answer = _apart(texts[last], texts[last - 1]) if texts[last] else ""
    return Chat("\n\n".join(texts[:last]).rstrip(), answer, None, str(row.get("id", name)), messages, tools)


def _text(message: Mapping[str, Any]) -> str:
    """The text of a message, without its tool calls."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def _apart(answer: str, prompt: str) -> str:
    """``answer`` with the white space before it: its own, else what ends the prompt, else one space."""
    return answer if answer[0].isspace() else (prompt[len(prompt.rstrip()) :] or " ") + answer
