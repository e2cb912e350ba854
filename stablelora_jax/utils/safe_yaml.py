"""YAML of strangers: what is written is small, keys are plain, and what aliases stand for is small too.

Everything is checked while the text is composed, before anything is built from it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import yaml

BYTES = 2**20  # of a file
NODES, EXPANDED, DEEPEST = 50_000, 100_000, 100  # as written; with every alias written out; one in another
DIGITS = 1000  # of a number


class Loader(yaml.SafeLoader):
    """``yaml.SafeLoader`` with limits; a date is a string."""

    yaml_implicit_resolvers = {  # 2026-01-31 stays a string: no key is a date
        first: [(tag, regexp) for tag, regexp in pairs if not tag.endswith(":timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _count = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, counted."""
        self._count, self._depth = self._count + 1, self._depth + 1
        if self._count > NODES:
            _refuse(self.peek_event(), f"it holds more than {NODES} values")  # type: ignore[no-untyped-call]
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(None, None, f"more than {DEEPEST} values lie in each other")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_scalar_node(self, anchor: Any) -> Any:
        """A scalar; a number is not a text's length."""
        node = super().compose_scalar_node(anchor)
        if len(node.value) > DIGITS and node.tag.endswith((":int", ":float")):
            _refuse(node, f"a number of more than {DIGITS} digits")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping whose keys are scalars, each there once."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a key must be plain text")
            if key.value in seen:
                _refuse(key, f"{key.value!r:.80} is given twice: keep one")
            seen.add(key.value)
        return node

    def compose_document(self) -> Any:
        """The document, which stays small with every alias written out."""
        node = super().compose_document()
        _expanded(node, {})
        return node


def _expanded(node: Any, known: dict[int, float]) -> float:
    """How many nodes ``node`` is with every alias in it written out; infinite while it is being counted."""
    if id(node) in known:
        if known[id(node)] == float("inf"):
            _refuse(node, "an alias stands for what it lies in")
        return known[id(node)]
    known[id(node)] = float("inf")
    size = 1.0
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        size += sum(_expanded(child, known) for child in (part if isinstance(part, tuple) else (part,)))
    if size > EXPANDED:
        _refuse(node, f"its aliases stand for more than {EXPANDED} values")
    known[id(node)] = size
    return size


def _refuse(place: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(None, None, problem, place.start_mark)
