"""One side of ``bench.py train`` as a worker process: requests on stdin, replies as lines of JSON on stdout.

A worker creates its model, warms up, and sends its metadata. Each line of stdin is then a number of steps to time
(after one untimed step); an empty line asks for its memory and ends it. Output of libraries goes to stderr.

On a CPU, memory is the resident set of the process, measured three times: the peak of the process, imports and
compilation included; the peak since the warm-up (Linux resets the counter on request); and the value before the model
was created, since the sides import different packages.
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

from bench.work import Workload, from_json


class Side(NamedTuple):
    """A compiled training step with its metadata."""

    run: Callable[[int], float]  # runs this many steps, waits for the last, returns its loss
    metadata: dict[str, Any]
    memory: Callable[[], dict[str, Any]]  # returns peak_memory_bytes and optional further counters
    release_memory: Callable[[], None] = lambda: None  # called after each round: frees caches for the other sides


def serve(prepare: Callable[[Workload], Side]) -> None:
    """Run the worker loop with the side that ``prepare`` returns for the workload on the command line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        side = prepare(from_json(sys.argv[1]))
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) or type(error).__name__ == "InputError":  # by name: its module imports jax
            return reply(error=str(error))
        raise
    reply(**side.metadata)
    for line in sys.stdin:
        if not line.strip():
            return reply(**side.memory())
        side.run(1)  # brings memory and caches back to their state in training
        began = time.perf_counter()
        loss = side.run(int(line))
        seconds = time.perf_counter() - began
        side.release_memory()
        reply(seconds=seconds, loss=loss)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident(peak: bool = False) -> int | None:
    """The resident set of this process in bytes, current or peak; None where the system does not report it."""
    try:
        found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        return 1024 * int(found[1]) if found else None
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak else None  # macOS counts bytes


def reset_peak() -> bool:
    """Reset the peak of the resident set to its current value; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def host_memory(before: int | None) -> Callable[[], dict[str, Any]]:
    """Reset the peak; to be called after the warm-up. The returned function reads the memory at the end."""
    warm = resident(peak=True)
    was_reset = reset_peak()

    def memory() -> dict[str, Any]:
        steps = resident(peak=True)
        total = max(warm or 0, steps or 0)
        return {"peak_memory_bytes": total, "steps_bytes": steps if was_reset else None, "before_bytes": before}

    return memory
