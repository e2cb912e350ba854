"""Progress of a loop on stderr: a tqdm bar on a terminal, elsewhere (a log file, CI) a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
QUIET, PAUSE, SILENCE = 10.0, 1.0, 60.0  # seconds: no line before the first; between two lines, least and most
SHARE = 10  # per cent between two lines


class ProgressLines:
    """What is used of ``tqdm``, in lines: one for each further 10 % or minute, none in the first 10 seconds.

    The end is left to what comes after the loop.
    The time left is that of the steps after the first, which often compiles.
    """

    def __init__(
        self, total: int, desc: str, unit: str, initial: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._done = total, initial
        self._desc, self._unit, self._postfix = desc, unit, ""
        self._clock, self._began = clock, clock()
        self._first: tuple[float, int] | None = None  # time and count of the first update
        self._shown_at, self._shown_share = self._began, self._share()

    def update(self, n: int = 1) -> None:
        """Count ``n`` more, and print a line where one is due."""
        self._done += n
        now = self._clock()
        self._first = self._first or (now, self._done)
        pause = now - self._shown_at
        due = (self._share() > self._shown_share and pause >= PAUSE) or pause >= SILENCE
        if due and now - self._began >= QUIET and self._done < self._total:
            self._shown_at, self._shown_share = now, self._share()
            print(self._line(now), file=sys.stderr, flush=True)

    def set_postfix(self, *, refresh: bool = True, **values: str) -> None:
        """Values that the next line shows."""
        del refresh
        self._postfix = "".join(f", {name}={value}" for name, value in values.items())

    def close(self) -> None:
        """Nothing to do; tqdm has it."""

    def _share(self) -> int:
        return self._done * 100 // max(1, self._total) // SHARE

    def _line(self, now: float) -> str:
        began, first = self._first or (now, self._done)
        steps, left = self._done - first, ""
        if steps:
            left = f", {_duration((now - began) / steps * (self._total - self._done))} left"
        done = f"{self._desc}: {self._done} of {self._total} {self._unit} ({self._done * 100 // max(1, self._total)} %)"
        return f"{done}, {_duration(now - self._began)} elapsed{left}{self._postfix}"


def open_progress(
    total: int, desc: str, unit: str, *, initial: int = 0, hidden: bool = False, leave: bool = True
) -> Any:
    """A ``tqdm`` bar or, where stderr is no terminal, :class:`ProgressLines`.

    Args:
      total: of what is counted.
      desc: the name of the loop.
      unit: what is counted, in the plural.
      initial: what of it is done already.
      hidden: show nothing.
      leave: leave a finished bar on the terminal.
    """
    if not hidden and not sys.stderr.isatty():
        return ProgressLines(total, desc, unit, initial)
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, desc=desc, unit=unit.removesuffix("s"), disable=hidden, leave=leave)


def track(items: Sequence[T], desc: str, unit: str, *, hidden: bool = False) -> Iterator[T]:
    """``items``, with their progress shown unless ``hidden``; a bar disappears at the end."""
    progress = open_progress(len(items), desc, unit, hidden=hidden, leave=False)
    try:
        for item in items:
            yield item
            progress.update()
    finally:
        progress.close()


def _duration(seconds: float) -> str:
    """Seconds for people.

    Example::

      >>> [_duration(seconds) for seconds in (9.6, 130, 7300)]
      ['10 s', '2 min', '2 h 2 min']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
