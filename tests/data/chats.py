"""Chats that the tests of chat encoding share."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number", "description": "a"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}


def user(i):
    return {"role": "user", "content": f"Question {i}? "}


def said(i, **more):
    return {"role": "assistant", "content": f"Answer {i} é😀.", **more}


def calls(i, **more):
    call = {"type": "function", "id": "call12345", "function": {"name": "add", "arguments": {"a": i}}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **more}


def answered(i):
    return {"role": "tool", "name": "add", "tool_call_id": "call12345", "content": str(i)}


def turns(n, system=False):
    return [SYSTEM] * system + [message for i in range(n) for message in (user(i), said(i))]


def thought(i):
    return {"reasoning_content": f"Thought {i}"}


CHATS = {
    **{f"{n} turns": (turns(n), None) for n in (1, 2, 3)},
    "8 turns, system": (turns(8, True), None),
    "tools": (turns(1, True), TOOLS),
    "a call": ([user(0), calls(0), answered(1), said(0)], TOOLS),
    "two answers": ([SYSTEM, user(0), calls(0), answered(1), answered(2), said(0), user(1), said(1)], TOOLS),
    "reasoning": ([user(0), said(0, **thought(0))], None),
    "reasoning in two turns": ([user(0), said(0, **thought(0)), user(1), said(1, **thought(1))], None),
    "reasoning at the end": ([user(0), said(0), user(1), said(1, **thought(1))], None),
    "reasoning in a call": ([user(0), calls(0, **thought(0)), answered(1), said(0, **thought(1))], TOOLS),
}
