"""Which schema rows have, and those of others as this package's: ShareGPT's conversations, Alpaca's instructions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stablelora_jax.config.run import JsonlTask
from stablelora_jax.data.tasks import rows
from stablelora_jax.utils.errors import InputError


class Schema(NamedTuple):
    """Rows as others publish them."""

    kind: Literal["choice", "completion", "chat", "preference", "text"]
    columns: tuple[str, ...]  # that tell it from those below
    said: str


SCHEMAS = (  # the first whose columns are there
    Schema("chat", ("messages",), "OpenAI's messages: chats, in the model's chat template"),
    Schema("chat", ("conversations",), "ShareGPT's conversations: chats, in the model's chat template"),
    Schema("choice", ("prompt", "choices", "label"), "multiple choice: the right choice is learnt"),
    Schema("preference", ("prompt", "chosen", "rejected"), "preferences: pairs, for objective dpo, orpo or simpo"),
    Schema("completion", ("prompt", "completion"), "prompt and completion: the completion is learnt"),
    Schema("completion", ("instruction", "output"), "Alpaca's: instruction, a blank line and input; output is learnt"),
    Schema("text", ("text",), "text alone: all of it is learnt"),
)
SPEAKERS = {  # of ShareGPT
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def recognised(task: JsonlTask, log_fn: Callable[[str], None]) -> JsonlTask:
    """``task`` with the kind of its rows, where that is ``auto``: the schema of the first row, which is said.

    Raises:
      InputError: there are no rows, or they have none of :data:`SCHEMAS`.
    """
    if task.kind != "auto":
        return task
    if (task.path is None) == (task.hub is None):
        raise InputError("task jsonl needs either task.path or task.hub")
    hub = rows.Hub(str(task.hub), task.hub_config)
    origin, found = rows.hub_rows(hub, "train") if task.hub else rows.local_split(Path(str(task.path)), "train")
    first = next(iter(islice(found, 1)), None)
    if not isinstance(first, Mapping):
        raise InputError(f"{origin}: row 1 is no object with columns, so that task.kind=auto cannot know what it is")
    renamed = {column: name for name, column in task.fields.items()}
    columns = {renamed.get(column, column) for column in first}
    schema = next((schema for schema in SCHEMAS if columns.issuperset(schema.columns)), None)
    if schema is None:
        raise InputError(
            f"{origin}: row 1 has the columns {', '.join(map(str, first))}, which task.kind=auto does not know: say "
            "what a row is with task.kind, and which column is what with task.fields"
        )
    log_fn(f"{origin}: rows of {schema.said} (task.kind={schema.kind})")
    return replace(task, kind=schema.kind)


def messages_of(found: Any) -> Any:
    """ShareGPT's ``{"from": ..., "value": ...}`` as messages; anything else as it is."""
    if not isinstance(found, list | tuple) or not found or not all(_is_sharegpt(one) for one in found):
        return found
    for number, one in enumerate(found, 1):
        if one["from"] not in SPEAKERS:
            raise rows.Unsupported(f"message {number} is from {one['from']!r:.20}, which is none of {_names(SPEAKERS)}")
    return [{"role": SPEAKERS[one["from"]], "content": one["value"]} for one in found]


def _is_sharegpt(one: Any) -> bool:
    return isinstance(one, Mapping) and "from" in one and "value" in one and isinstance(one["from"], str)


def _names(speakers: Mapping[str, str]) -> str:
    return ", ".join(speakers)


def tools_of(found: Any) -> Any:
    """Tools, which data sets of the hub hold as JSON in a string."""
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found) if found.strip() else None
    except ValueError:
        raise rows.Unsupported(f"tools is {found!r:.40}, which is no JSON: a list of JSON schemas is needed") from None


def chat_row(row: Mapping[str, Any], fields: Mapping[str, str]) -> Mapping[str, Any]:
    """A row of chats with ``messages``, where it has ShareGPT's ``conversations`` (and perhaps ``system``)."""
    if "messages" in row or "messages" in fields or "conversations" not in row:
        return row
    found, system = messages_of(row["conversations"]), row.get("system")
    if isinstance(found, list) and isinstance(system, str) and system.strip():
        found = [{"role": "system", "content": system}, *found]
    return {**row, "messages": found}


def completion_row(row: Mapping[str, Any], fields: Mapping[str, str]) -> Mapping[str, Any]:
    """A row with ``prompt`` and ``completion``, where it has Alpaca's ``instruction``, ``input`` and ``output``."""
    if fields or "prompt" in row or "completion" in row or not {"instruction", "output"} <= set(row):
        return row
    parts: Sequence[Any] = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("instruction or input is no string")
    return {**row, "prompt": "\n\n".join(part for part in parts if part.strip()), "completion": row["output"]}
