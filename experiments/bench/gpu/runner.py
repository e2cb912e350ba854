"""Runs measurements, each in a child process with a time limit; a row is written as soon as it is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from bench.gpu import about, rows
from bench.gpu.suite import RIGHT, Measurement
from bench.turns import QUIET_ENV

EXPERIMENTS = Path(__file__).parents[2]
QUICK = "--xla_backend_optimization_level=0"  # with toy shapes compilation dominates
LEAST = 0.4  # the share of a row's time limit that must be left of the budget to start it
SPARE = 5.0  # seconds of the budget reserved for the report
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # exit codes after the system's out-of-memory killer


@dataclass
class Session:
    """The settings and state of one call of the command."""

    output: Path
    deadline: float  # time.monotonic()
    toy: bool = False
    limit: float | None = None  # seconds; replaces the time limit of every row
    spoil: dict[str, str] = field(default_factory=dict)  # failures to inject, by row
    again: frozenset[str] = frozenset()  # rows to measure again and replace
    interpreters: dict[str, str] = field(default_factory=dict)  # Python interpreters of peers, by peer
    report: Callable[[], None] = lambda: None  # called after each row
    command: str = ""  # template of the command that repeats a row
    running: set[Any] = field(default_factory=set)  # child processes
    ended: bool = False
    lock: Any = field(default_factory=Lock)


def run(session: Session, measurements: Sequence[Measurement], jobs: int = 1) -> None:
    """Run ``measurements`` in order until the budget is used up, ``jobs`` at a time."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in [pool.submit(_row, session, one) for one in measurements]:
            future.result()
    except BaseException:
        session.ended = True
        for process in list(session.running):
            _kill(process)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _row(session: Session, one: Measurement) -> None:
    """Run one measurement, halving the batch if it runs out of memory, and write its row.

    No row is written if the budget ends first: the next call measures it.
    """
    began, limit = time.monotonic(), session.limit or one.seconds
    if session.ended or session.deadline - began - SPARE < LEAST * limit:
        return
    arguments, tried = {**one.arguments, **(one.toy if session.toy else {})}, []
    while True:
        left = session.deadline - time.monotonic() - SPARE
        spoil = session.spoil.get(one.name) if not tried else None
        found = _run_child(session, one, arguments, min(limit, left), spoil)
        if session.ended or (found["status"] == "timeout" and left < limit):
            return  # the budget ended before the row's own time limit
        smaller = halved(arguments) if found["status"] == "memory" else None
        if smaller is None:
            break
        tried.append({"batch": arguments["batch"], "why": found["why"]})
        arguments = smaller
    if found["status"] == "done" and one.summary:
        found = _with_summary(one.summary, found, arguments)
    row = {"name": one.name, "section": one.section, "function": one.function, "arguments": arguments}
    row |= {**found, **({"tried": tried} if tried else {}), "seconds": round(time.monotonic() - began, 1)}
    row |= {"command": session.command.format(name=one.name), **about.provenance()}
    with session.lock:
        rows.write(session.output, row, one.name in session.again)
        print(f"{one.name}: {row['status']}, {row['seconds']} s{_why(row)}", file=sys.stderr, flush=True)
        session.report()


def _with_summary(summary: Callable[..., Any], found: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """``found`` with its summary; if the summary fails, the row is ``failed`` and keeps the measurement as ``raw``."""
    try:
        return {**found, "measured": summary(found["measured"], arguments)}
    except Exception as error:
        return {
            "status": "failed",
            "why": f"no summary: {type(error).__name__}: {error}"[:300],
            "raw": found["measured"],
        }


def halved(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """``arguments`` with half the batch; None if a micro-batch would have no row left."""
    batch = arguments.get("batch", 1)
    if batch // 2 < arguments.get("accumulate", 1):
        return None
    return {**arguments, "batch": batch // 2}


def _run_child(session: Session, one: Measurement, arguments: dict[str, Any], limit: float, spoil: str | None) -> Any:
    """Run a measurement in a child process; returns its result, or a status that says how the process ended."""
    request = json.dumps({"function": one.function, "arguments": arguments, "gpu": not session.toy, "spoil": spoil})
    python = session.interpreters.get(one.python or "", sys.executable)
    log = session.output / "logs" / f"{one.name}.txt"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    words = [python, "-m", "bench.gpu.child", request]
    with log.open("a") as errors:  # keeps the log of attempts with a larger batch
        try:
            process = subprocess.Popen(words, stderr=errors, env=_environment(session, one), **pipes)
        except OSError as error:
            return {"status": "failed", "why": f"{python} cannot be started: {error.strerror}"}
        session.running.add(process)
        try:
            line = _line(process, limit)
        finally:
            _kill(process)
            session.running.discard(process)
    if line is None:
        return {"status": "timeout", "why": f"not finished within {limit:.0f} s"}
    if line.endswith("\n"):
        return json.loads(line)
    code, output = process.returncode, log.read_text(errors="replace").strip().splitlines()
    why = f"ended with exit code {code}" + (f": {output[-1][:300]}" if output else "")
    memory = code in KILLED or any("out of memory" in text.lower() for text in output[-20:])
    return {"status": "memory" if memory else "failed", "why": why}


def _line(process: Any, limit: float) -> str | None:
    """The line that the process prints; "" if it exits without one, None if it exceeds the limit."""
    stdin = process.stdin
    process.stdin = None  # kept open: the child kills itself when it is closed by our death
    try:
        return process.communicate(timeout=max(limit, 1))[0]
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.held_stdin = stdin


def _kill(process: Any) -> None:
    """Kill the process with all its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (getattr(process, "held_stdin", None), process.stdout):
        if pipe:
            pipe.close()


def _environment(session: Session, one: Measurement) -> dict[str, str]:
    paths = [str(EXPERIMENTS), str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")]
    fraction = {} if "XLA_CLIENT_MEM_FRACTION" in os.environ else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    given = {**fraction, **os.environ}  # JAX's default is 0.75; PyTorch has no such limit
    given |= QUIET_ENV
    given["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if one.section == RIGHT:  # several at a time, and each needs the CPU backend too
        platforms = given.get("JAX_PLATFORMS", "")
        given["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        given |= {"JAX_PLATFORMS": f"{platforms},cpu"} if platforms and "cpu" not in platforms else {}
    return {**given, **(_toy(session.output, given) if session.toy else {})}


def _toy(output: Path, given: dict[str, str]) -> dict[str, str]:
    """The environment of a rehearsal: the CPU, and a compile cache, since most rows compile the same programs."""
    cache = {"JAX_COMPILATION_CACHE_DIR": given.get("JAX_COMPILATION_CACHE_DIR", str(output / "cache"))}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_ENABLE_COMPILATION_CACHE": "true"}
    return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": QUICK, **cache}


def _why(row: dict[str, Any]) -> str:
    return f": {row['why']}" if "why" in row else ""
