"""In which keys two descriptions differ, in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def differences(there: Any, here: Any, shown: Callable[[Any, Any], tuple[str, str]], path: str = "") -> list[str]:
    """One clause for each dotted key whose values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *(key for key in there if key not in here)]
        pairs = [(key, there.get(key, ...), here.get(key, ...)) for key in keys]
        return [d for key, a, b in pairs for d in differences(a, b, shown, f"{path}.{key}".lstrip("."))]
    if there is here or (... not in (there, here) and (there == here or json.dumps(there) == json.dumps(here))):
        return []
    return ["{} is {} there and {} here".format(path, *shown(there, here))]


def shown_forms(there: Any, here: Any) -> tuple[str, str]:
    """Shapes, dtypes, or both, as needed to tell the two leaves apart."""
    if ... in (there, here) or (there[0] != here[0] and there[1] != here[1]):
        return tuple("absent" if x is ... else f"{x[1]} {tuple(x[0])}" for x in (there, here))  # type: ignore
    return (str(tuple(there[0])), str(tuple(here[0]))) if there[0] != here[0] else (there[1], here[1])


def shown_values(there: Any, here: Any) -> tuple[str, str]:
    """Both as JSON."""
    texts = ("absent" if x is ... else json.dumps(x) for x in (there, here))
    return tuple(text if len(text) <= 60 else f"{text[:40]}..." for text in texts)  # type: ignore[return-value]


def some(clauses: list[str]) -> str:
    """The first five."""
    return ", ".join(clauses[:5]) + (f" and {len(clauses) - 5} more" if len(clauses) > 5 else "")
