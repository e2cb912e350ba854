"""Progress of a loop on stderr: a tqdm bar on a terminal, elsewhere (a log file, CI) a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
QUIET, SILENCE = 10.0, 60.0  # seconds: no line for a loop shorter than this; no longer time between two lines
SHARE = 10  # per cent between two lines


class ProgressLines:
    """What is used of ``tqdm``, in lines: one for each further 10 % or minute, none in the first 10 seconds."""

    def __init__(
        self, total: int, desc: str, unit: str, initial: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._initial, self._done = total, initial, initial
        self._desc, self._unit, self._postfix = desc, unit, ""
        self._clock, self._began = clock, clock()
        self._shown_at, self._shown_share = self._began, self._share()

    def update(self, n: int = 1) -> None:
        """Count ``n`` more, and print a line where one is due."""
        self._done += n
        now = self._clock()
        due = self._share() > self._shown_share or now - self._shown_at >= SILENCE
        if due and now - self._began >= QUIET:
            self._shown_at, self._shown_share = now, self._share()
            print(self._line(now - self._began), file=sys.stderr, flush=True)

    def set_postfix(self, *, refresh: bool = True, **values: str) -> None:
        """Values that the next line shows."""
        del refresh
        self._postfix = "".join(f", {name}={value}" for name, value in values.items())

    def close(self) -> None:
        """Nothing to do; tqdm has it."""

    def _share(self) -> int:
        return self._done * 100 // max(1, self._total) // SHARE

    def _line(self, seconds: float) -> str:
        left = seconds / max(1, self._done - self._initial) * (self._total - self._done)
        done = f"{self._desc}: {self._done} of {self._total} {self._unit} ({self._done * 100 // max(1, self._total)} %)"
        return f"{done}, {_duration(seconds)} elapsed, {_duration(left)} left{self._postfix}"


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
      ['10 s', '2 min', '2 h 1 min']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
