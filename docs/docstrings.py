"""Docstrings as Markdown for the reference, and the meanings of configuration keys as docstrings of their fields."""

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, ExprCall, Extension, Object

ROLE = re.compile(r":\w+:`~?([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example::\n\n", re.MULTILINE)  # which griffe calls Examples, and shows as code
COLONS = re.compile(r"(?: ::|::)(?=\n|$)")
KEYS = ("option", "section", "_help")  # functions of a field: (default, meaning, ...)


def as_markdown(text: str) -> str:
    """``:func:`run` `` is `` `run` ``, and a line that ends with ``::`` starts an indented block."""
    text = EXAMPLE.sub(r"\1Examples:\n", text)
    lines = ROLE.sub(lambda m: f"`{m[1].removeprefix('stablelora_jax.')}`", text)
    return COLONS.sub(lambda m: "" if m[0].startswith(" ") else ":", lines)


class Docstrings(Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_attribute(self, *, attr: Attribute, **kwargs: Any) -> None:
        """The meaning of a key is the docstring of its field, and its default the value."""
        value = attr.value
        if attr.docstring is None and isinstance(value, ExprCall) and str(value.function) in KEYS:
            try:
                attr.docstring = Docstring(f"{ast.literal_eval(str(value.arguments[1]))}.", parent=attr)
            except (ValueError, SyntaxError):  # an f-string
                return
            attr.value = value.arguments[0]
