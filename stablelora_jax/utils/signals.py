"""SIGTERM and SIGINT as a question that the training loop asks, so that a step is never cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def catch_signals() -> Iterator[Callable[[], int]]:
    """Note the first of :data:`SIGNALS`; what is given says which has come, 0 for none.

    A second signal is not waited for: it does what it always does. Outside the main thread, where Python gives no
    signals, nothing ever comes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield lambda: received[0] if received else 0
    finally:
        restore()
