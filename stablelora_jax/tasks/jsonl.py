"""Any rows: multiple choice, prompt and completion, or chat messages, from a file or the hub, columns by name.

``fields`` says which column is what; a column that is not named there has the name itself.

    choice       prompt, choices (list of strings), label (index from 0)                    -> Question
    completion   prompt, completion, target (optional: what the answer is judged by)        -> Problem
    chat         messages: [{"role", "content"}]: a system's (optional), a user's, an assistant's  -> Problem
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from stablelora_jax.errors import InputError
from stablelora_jax.tasks import rows
from stablelora_jax.tasks.question import Problem, Question

Kind = Literal["choice", "completion", "chat"]
NAMES = {
    "choice": ("prompt", "choices", "label", "id"),
    "completion": ("prompt", "completion", "target", "id"),
    "chat": ("messages", "id"),
}


def items(
    kind: Kind, split: str, path: str | None, hub: str | None, config: str | None, fields: Mapping[str, str]
) -> list[Question] | list[Problem]:
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
        raise InputError(f"task.fields.{unknown[0]} is not read for kind {kind}: {', '.join(NAMES[kind])} are")
    make: Any = {"choice": _question, "completion": _completion, "chat": _chat}[kind]
    found = rows.hub_rows(rows.Hub(hub, config), split) if hub else rows.local_split(Path(str(path)), split)
    return rows.parse(*found, split, lambda row, name: make(_named(row, kind, fields), name))


def _named(row: Mapping[str, Any], kind: Kind, fields: Mapping[str, str]) -> dict[str, Any]:
    columns = {name: fields.get(name, name) for name in NAMES[kind]}
    if absent := [column for name, column in columns.items() if name in fields and column not in row]:
        raise ValueError(f"there is no column {absent[0]!r}; the columns are {', '.join(row)}")
    return {name: row[column] for name, column in columns.items() if column in row}


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


def _chat(row: Mapping[str, Any], name: str) -> Problem:
    roles = [message["role"] for message in row["messages"]]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"messages must be (system,) user, assistant, not {', '.join(map(str, roles))}")
    *given, answer = [rows.text(message, "content") for message in row["messages"]]
    return Problem("\n\n".join(given).rstrip(), _apart(answer, given[-1]), None, str(row.get("id", name)))


def _apart(answer: str, prompt: str) -> str:
    """``answer`` with the white space before it: its own, else what ends the prompt, else one space."""
    return answer if answer[0].isspace() else (prompt[len(prompt.rstrip()) :] or " ") + answer
