"""Regular expressions of strangers: those of ``re``, with a limit on their length, their size and the time they take.

``re`` cannot be stopped, and an expression with repeats inside repeats may take longer than the universe is old. So
``re`` decides what is valid and matches what cannot take long; the rest goes to the package `regex
<https://pypi.org/project/regex/>`_, which reads the same syntax and knows a timeout. What all of them take within a
while has one limit, since there may be thousands.
"""

from __future__ import annotations

import re
import time
import warnings
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from stablelora_jax.utils.errors import InputError, brief

LONGEST, WIDEST = 1000, 10_000  # characters; characters once every {3} is written out
SHORT, STEPS = 128, 2**24  # a name that `re` may match, and how many steps it may need at most
SECONDS, WHILE = 3.0, 30.0  # what matching may take, within how long
FREE = 5e-6  # seconds of one match that nobody counts

TOKEN = re.compile(
    r"""\\.|\[\^?\]?(?:\\.|[^\]\\])*\]       # one character
    |(?P<count>\{(?P<least>\d*)(?:,\d*)?\})  # a quantifier, as are * + and ?
    |(?P<open>\((?:\?:)?)|.""",
    re.DOTALL | re.VERBOSE,
)

COMMENT = re.compile(r"\(\?(#|[a-zA-Z]*x)")


class Expression:
    """One valid expression."""

    def __init__(self, text: str, shown: str) -> None:
        self.shown, self._text = shown, text
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of syntax that may change
                self._own = re.compile(text)
            shape = _shape(text)
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise InputError(f"{shown!r:.80} is not a valid regular expression: {brief(error)}") from None
        if COMMENT.search(text):
            raise InputError(f"{shown!r:.80}: a comment in a regular expression is not supported: leave it out")
        if shape.width > WIDEST:
            raise InputError(f"{shown!r:.80} repeats too much: it stands for {shape.width:.3g} characters")
        self._quick = shape.quick

    def matches(self, name: str) -> bool:
        """Whether all of ``name`` matches.

        Raises:
          InputError: it takes too long.
        """
        return _outcome(self, name)

    def find(self, name: str) -> bool:
        """:meth:`matches`, found anew and on the clock."""
        left, start = _clock.left(), time.perf_counter()
        try:
            if self._quick and len(name) <= SHORT:
                found = self._own.fullmatch(name)
            else:
                found = _other(self._text, self.shown).fullmatch(name, timeout=max(left, 0.01))
        except (TimeoutError, MemoryError):
            self._too_long()
        if _clock.spend(time.perf_counter() - start) < 0:
            self._too_long()
        return found is not None

    def _too_long(self) -> NoReturn:
        _clock.restart()
        raise InputError(
            f"{self.shown!r:.80} takes longer than {SECONDS:g} s to match: "
            "leave out repeats of repeats, or list the names of modules"
        ) from None


@lru_cache(4096)
def expression(pattern: str, ending: bool = False) -> Expression:
    """The expression for whole names; with ``ending`` for a name, or for what follows any of its dots, as in PEFT.

    Raises:
      InputError: it is not valid, or too long.
    """
    require_length(pattern)
    return Expression(rf"(.*\.)?({pattern})$" if ending else pattern, pattern)


def require_length(pattern: str) -> None:
    """Check that an expression is not too long.

    Raises:
      InputError: it is.
    """
    if len(pattern) > LONGEST:
        raise InputError(
            f"{pattern!r:.80} is a regular expression of {len(pattern)} characters, more than {LONGEST}: "
            "list the names of modules"
        )


@lru_cache(2**16)
def _outcome(one: Expression, name: str) -> bool:
    return one.find(name)


@lru_cache(256)
def _other(text: str, shown: str) -> Any:
    import regex

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return regex.compile(text)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise InputError(f"{shown!r:.80} is not a regular expression that can be used: {brief(error)}") from None


class _Clock:
    """How long matching took within the last :data:`WHILE`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._spent = time.monotonic(), 0.0

    def left(self) -> float:
        if time.monotonic() - self._since > WHILE:
            self.restart()
        return SECONDS - self._spent

    def spend(self, seconds: float) -> float:
        """What is left after ``seconds`` more."""
        self._spent += max(0.0, seconds - FREE)
        return SECONDS - self._spent


_clock = _Clock()


class _Shape(NamedTuple):
    width: float  # characters once every count is written out
    quick: bool  # whether `re` needs at most STEPS for a name of at most SHORT


def _shape(text: str) -> _Shape:
    """The shape of a valid expression. ``re`` tries at most every way to place each repeat and to take each branch."""
    widths, bars, ways, before, quick = [[0.0]], [0], 1.0, "", True
    for token in TOKEN.finditer(text):
        this = token[0]
        if token["count"] or this in ("*", "+", "?"):
            if token["least"]:
                widths[-1][-1] *= max(1.0, float(token["least"]))
            if before != "quantifier":  # else it says lazy or possessive
                quick = quick and (before != ")" or this == "?")
                ways *= 2 if this == "?" else SHORT
            before = "quantifier"
            quick = quick and not (this == "?" and not widths[-1][1:])  # (?=, (?!, (?P<, ...
            continue
        before = this
        if token["open"]:
            widths.append([0.0])
            bars.append(0)
        elif this == ")" and len(widths) > 1:
            whole = sum(widths.pop())
            widths[-1].append(whole)
            ways *= bars.pop() + 1
        else:
            bars[-1] += this == "|"
            widths[-1].append(1.0)
            quick = quick and not (this[0] == "\\" and this[1:].isdigit())  # \1
    return _Shape(sum(map(sum, widths)), quick and ways * (bars[0] + 1) <= STEPS)
