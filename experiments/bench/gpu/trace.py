"""Reads a profiler trace into plain tuples and summarises them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from bench.gpu.parts import CONTAINER, PARTS, kernel_name, operation, part_of

Event = tuple[str, str, str, float, float]  # line (a stream or a thread), name, instruction or "", start and length, ns
REPEATED = ("XLA Modules", "XLA Ops", "Steps", "Framework Ops", "Framework Name Scope", "Source code", "XLA TraceMe")
LONGEST = 10


def events_of(folder: str) -> list[Event]:
    """All kernels in the trace under ``folder``: those of a GPU's streams, or the instructions of a CPU's threads."""
    paths = sorted(Path(folder).rglob("*.xplane.pb"))
    planes = [plane for path in paths for plane in jax.profiler.ProfileData.from_file(str(path)).planes]
    gpu = jax.default_backend() == "gpu"
    kept = [plane for plane in planes if plane.name.startswith("/device:GPU" if gpu else "/host:CPU")]
    return [event for plane in kept for event in _of_plane(plane, gpu)]


def _of_plane(plane: Any, gpu: bool) -> Iterator[Event]:
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    for number, line in enumerate(streams or lines):
        if line.name in REPEATED or "overhead" in line.name.lower():
            continue
        for event in line.events:
            hlo_op = _instruction(dict(event.stats))
            if event.duration_ns > 0 and (gpu or hlo_op):
                yield f"{plane.name} {number} {line.name}", event.name, hlo_op, event.start_ns, event.duration_ns


def _instruction(stats: dict[Any, Any]) -> str:
    """The HLO instruction of an event; if unknown, or only its command buffer is known, the model operation."""
    found = str(stats.get("hlo_op", ""))
    if found and not CONTAINER.match(found):
        return found
    paths = (str(stats.get(key, "")) for key in ("name", "tf_op"))
    return next((path for path in paths if "/" in path), found)


def summarize_trace(events: Iterable[Event], op_names: dict[str, str], steps: int) -> dict[str, Any]:
    """Shares of device time by part, the idle time, and the longest kernels.

    Device time is summed over lines (streams or threads); the time of nested events counts for the innermost only. The
    traced time is from the start of the first kernel to the end of the last. ``guessed`` is the share of device time
    that is assigned to a part by the kernel's name only. Milliseconds are per step.

    Raises:
      ValueError: the trace contains no kernel.
    """
    kept = [event for event in events if not CONTAINER.match(event[1])]
    if not kept:
        raise ValueError("the trace contains no kernel")
    by_kernel = {kernel_name(name): op for name, op in op_names.items()}
    times: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for (_, name, hlo_op, _, _), own in _own_times(kept):
        key = name, operation(name, hlo_op, op_names, by_kernel)
        times[key] += own
        calls[key] += 1
    total, each = sum(times.values()), 1e6 * steps
    parts = dict.fromkeys(PARTS, 0.0)
    for key, time in times.items():
        parts[part_of(*key)] += time
    span = max(start + length for *_, start, length in kept) - min(start for *_, start, _ in kept)
    idle = max(0.0, span - _busy(kept))
    return {
        "shares": {part: time / total for part, time in parts.items()},
        "milliseconds": {part: time / each for part, time in parts.items()},
        "idle": idle / span,
        "idle_milliseconds": idle / each,
        "traced_milliseconds": span / each,
        "guessed": sum(time for (_, op), time in times.items() if not op) / total,
        "kernels": _longest(times, calls, steps),
    }


def _own_times(events: Sequence[Event]) -> list[tuple[Event, float]]:
    """Each event with its self time: its duration minus that of the events nested directly in it, on the same line."""
    found: list[list[Any]] = []
    around: list[int] = []  # indices of the events that may enclose the next one, outermost first
    for event in sorted(events, key=lambda event: (event[0], event[3], -event[4])):
        line, _, _, start, length = event
        while around and not _contains(found[around[-1]][0], line, start + length):
            around.pop()
        if around:
            found[around[-1]][1] -= length
        around.append(len(found))
        found.append([event, length])
    return [(event, max(0.0, own)) for event, own in found]


def _contains(outer: Event, line: str, end: float) -> bool:
    """Whether ``outer`` encloses an event of ``line`` that does not start before it and ends at ``end``."""
    return outer[0] == line and end <= outer[3] + outer[4]


def _busy(events: Iterable[Event]) -> float:
    """The time during which at least one event runs, on any line."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted((start, start + length) for *_, start, length in events):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def _longest(
    times: dict[tuple[str, str], float], calls: dict[tuple[str, str], int], steps: int
) -> list[dict[str, Any]]:
    """The kernels with the largest total time by name; part and operation are those with the largest share of it."""
    total, names = sum(times.values()), defaultdict(list)
    for key in sorted(times, key=lambda key: -times[key]):
        names[key[0]].append(key)
    sums = {name: sum(times[key] for key in keys) for name, keys in names.items()}
    return [
        {
            "name": name[:120],
            "milliseconds": sums[name] / 1e6 / steps,
            "calls": sum(calls[key] for key in names[name]) / steps,
            "share": sums[name] / total,
            "part": part_of(*names[name][0]),
            "operation": names[name][0][1],
        }
        for name in sorted(sums, key=lambda name: -sums[name])[:LONGEST]
    ]
