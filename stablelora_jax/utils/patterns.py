"""Patterns for the names of modules, at any number.

Most patterns hold names, in which a dot stands for any character: these are found by looking a name up, so a list of
100,000 of them costs no more than a list of ten. The others are :mod:`stablelora_jax.utils.expressions`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.expressions import Expression, expression

MOST = 1000  # regular expressions in one map of patterns
DOTS = 64  # ways to place the dots that stand for any character, in one table
KEPT = 2**12  # names whose patterns are remembered
ANY = "\0"  # what stands for any character in a text of a table
PLAIN = r"(?:\w|-|\.|\\\W)+"  # a name as an expression
TOKEN = re.compile(rf"{PLAIN}|[(|)]")


class Texts:
    """Texts with the numbers they were put in under; :data:`ANY` in a text stands for any character."""

    def __init__(self) -> None:
        self._found: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}  # by length, then by places of ANY
        self.shapes, self.any = 0, False

    def put(self, text: str, number: int) -> None:
        """Add ``text``."""
        places = tuple(i for i, letter in enumerate(text) if letter == ANY)
        shapes, self.any = self._found.setdefault(len(text), {}), True
        self.shapes += places not in shapes and bool(places)
        shapes.setdefault(places, {}).setdefault(text, []).append(number)

    def numbers(self, name: str) -> Iterator[int]:
        """The numbers of the texts that are ``name``."""
        for places, texts in self._found.get(len(name), {}).items():
            letters = list(name)
            for place in places:
                letters[place] = ANY
            yield from texts.get("".join(letters), ())


class Table:
    """Patterns for the ends of names, as keys of ``rank_pattern`` are."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._ends, self._whole, self._others = Texts(), Texts(), dict[int, Expression]()
        self._known: dict[str, set[int]] = {}
        for number, pattern in enumerate(patterns):
            text = _plain(pattern.removeprefix("^"))
            if text is None or self._ends.shapes + self._whole.shapes > DOTS:
                self._others[number] = expression(pattern, ending=True)
            else:
                (self._whole if pattern.startswith("^") else self._ends).put(text, number)
            if len(self._others) > MOST:
                raise InputError(f"more than {MOST} regular expressions in one map: list the names of modules")

    def numbers(self, name: str) -> set[int]:
        """Which patterns match ``name``."""
        if name not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[name] = self._numbers(name)
        return self._known[name]

    def _numbers(self, name: str) -> set[int]:
        found = {number for number, one in self._others.items() if one.matches(name)}
        found.update(self._whole.numbers(name))
        for end in endings(name):
            found.update(self._ends.numbers(end))
        return found


@lru_cache(2**14)
def endings(name: str) -> tuple[str, ...]:
    """``a.b.c``, ``b.c`` and ``c``."""
    found = [name]
    while "." in name:
        name = name.partition(".")[2]
        found.append(name)
    return tuple(found)


def matches_whole(pattern: str, name: str) -> bool:
    """Whether all of ``name`` matches ``pattern``.

    Raises:
      InputError: the pattern is not a valid expression, too long, or takes too long.
    """
    found = whole(pattern)
    return found.matches(name) if isinstance(found, Expression) else any(True for _ in found.numbers(name))


@lru_cache(256)
def whole(pattern: str) -> Texts | Expression:
    """How whole names are compared with ``pattern``.

    Raises:
      InputError: it is not a valid expression, or too long.
    """
    texts = Texts()
    for text in _alternatives(pattern) or ():
        texts.put(text, 0)
    return texts if texts.any and texts.shapes <= DOTS else expression(pattern)


@lru_cache(256)
def table(patterns: tuple[str, ...]) -> Table:
    """The patterns of a map.

    Raises:
      InputError: one is not a valid expression, too long, or there are too many.
    """
    return Table(patterns)


def _plain(pattern: str) -> str | None:
    """The text that a pattern without alternatives stands for, or None where it is more than a name."""
    if not re.fullmatch(PLAIN, pattern):
        return None
    return re.sub(r"\\(.)|\.", lambda found: found[1] or ANY, pattern, flags=re.DOTALL)


def _alternatives(pattern: str) -> list[str] | None:
    """The texts of an expression that is nothing but names, | and parentheses around alternatives; or None."""
    texts, depth, end, open_for_more = list[str](), 0, 0, True
    for token in TOKEN.finditer(pattern):
        this = token[0]
        if token.start() != end or open_for_more != (this not in "|)"):
            return None
        end, depth = token.end(), depth + (this == "(") - (this == ")")
        open_for_more = this in "(|"
        if depth < 0:
            return None
        if this not in "(|)":
            texts.append(_plain(this) or "")
    return texts if end == len(pattern) and not depth and not open_for_more else None
