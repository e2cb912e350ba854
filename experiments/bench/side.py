"""One side of ``bench.py train`` as a process of its own: told on stdin what to do, answers lines of JSON on stdout.

A side makes its model, warms up, says ``about``, and then runs as many steps as each line of stdin says (after one that
is not timed), until an empty line asks for its memory. Whatever libraries print goes to stderr.

On a CPU memory is the process's resident set: its highest ever, with imports and compilation; the same since the
warm-up (Linux forgets the first on request); and what it was before there was a model, since imports differ.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.work import Work, loaded


class Side(NamedTuple):
    """A step that is ready."""

    run: Callable[[int], float]  # does so many steps, waits for the last, gives its loss
    about: dict[str, Any]
    memory: Callable[[], dict[str, Any]]  # peak_memory_bytes, and what else is known
    rest: Callable[[], None] = lambda: None  # after each round: makes room for the other side


def serve(prepare: Callable[[Work], Side]) -> None:
    """Be the side that ``prepare`` makes of the work on the command line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        side = prepare(loaded(sys.argv[1]))
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) or type(error).__name__ == "InputError":  # not imported: it brings jax along
            return answer(error=str(error))
        raise
    answer(**side.about)
    for line in sys.stdin:
        if not line.strip():
            return answer(**side.memory())
        side.run(1)  # memory and caches are again as in training
        began = time.perf_counter()
        loss = side.run(int(line))
        seconds = time.perf_counter() - began
        side.rest()
        answer(seconds=seconds, loss=loss)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident(peak: bool = False) -> int | None:
    """Bytes of this process in memory, now or at most; None where the system does not say."""
    try:
        found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        return 1024 * int(found[1]) if found else None
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak else None  # macOS counts bytes


def forget_peak() -> bool:
    """Let the highest resident set be today's; False where it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def host_memory(before: int | None) -> Callable[[], dict[str, Any]]:
    """Called once after the warm-up; what it gives is called at the end."""
    warm = resident(peak=True)
    forgotten = forget_peak()

    def memory() -> dict[str, Any]:
        steps = resident(peak=True)
        total = max(warm or 0, steps or 0)
        return {"peak_memory_bytes": total, "steps_bytes": steps if forgotten else None, "before_bytes": before}

    return memory
