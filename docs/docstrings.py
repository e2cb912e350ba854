"""Docstrings as Markdown: roles and double colons of reStructuredText, which the package's docstrings use sparingly."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":\w+:`~?([^`]+)`")
COLONS = re.compile(r"(?: ::|::)(?=\n|$)")


def as_markdown(text: str) -> str:
    """``:func:`run` `` is `` `run` ``, and a line that ends with ``::`` starts an indented block."""
    lines = ROLE.sub(lambda m: f"`{m[1].removeprefix('stablelora_jax.')}`", text)
    return COLONS.sub(lambda m: "" if m[0].startswith(" ") else ":", lines)


class Docstrings(Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
