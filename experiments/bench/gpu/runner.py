"""Measurements in turn, each a process with a time limit; a row is written the moment that one is done."""

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
from bench.turns import QUIET

EXPERIMENTS = Path(__file__).parents[2]
QUICK = "--xla_backend_optimization_level=0"  # toy shapes are compiled for longer than they run
LEAST = 0.4  # of a row's time limit that must be left of the budget
SPARE = 5.0  # seconds of the budget that are left for the report
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # nobody but the system does this: it is out of memory


@dataclass
class Session:
    """One call of the command."""

    output: Path
    deadline: float  # time.monotonic()
    toy: bool = False
    limit: float | None = None  # seconds of every row, in place of its own
    spoil: dict[str, str] = field(default_factory=dict)
    again: frozenset[str] = frozenset()  # rows to be replaced
    pythons: dict[str, str] = field(default_factory=dict)  # interpreters of peers that live elsewhere
    report: Callable[[], None] = lambda: None
    command: str = ""
    running: set[Any] = field(default_factory=set)
    ended: bool = False
    lock: Any = field(default_factory=Lock)


def run(session: Session, measurements: Sequence[Measurement], jobs: int = 1) -> None:
    """Measure all of ``measurements``, in their order, as far as the budget goes; ``jobs`` side by side."""
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
    """Measure, and write the row, unless the budget's end came first."""
    began, limit = time.monotonic(), session.limit or one.seconds
    if session.ended or session.deadline - began - SPARE < LEAST * limit:
        return
    arguments, tried = {**one.arguments, **(one.toy if session.toy else {})}, []
    while True:
        left = session.deadline - time.monotonic() - SPARE
        spoil = session.spoil.get(one.name) if not tried else None
        found = _child(session, one, arguments, min(limit, left), spoil)
        if session.ended or (found["status"] == "timeout" and left < limit):
            return  # the budget has ended, not the row's own time: the next call measures it
        smaller = halved(arguments) if found["status"] == "memory" else None
        if smaller is None:
            break
        tried.append({"batch": arguments["batch"], "why": found["why"]})
        arguments = smaller
    if found["status"] == "done" and one.summary:
        found = _summed(one.summary, found, arguments)
    row = {"name": one.name, "section": one.section, "function": one.function, "arguments": arguments}
    row |= {**found, **({"tried": tried} if tried else {}), "seconds": round(time.monotonic() - began, 1)}
    row |= {"command": session.command.format(name=one.name), **about.place()}
    with session.lock:
        rows.write(session.output, row, one.name in session.again)
        print(f"{one.name}: {row['status']}, {row['seconds']} s{_why(row)}", file=sys.stderr, flush=True)
        session.report()


def _summed(summary: Callable[..., Any], found: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The row with its summary; where there is none to be had, what was measured stays."""
    try:
        return {**found, "measured": summary(found["measured"], arguments)}
    except Exception as error:
        return {
            "status": "failed",
            "why": f"no summary: {type(error).__name__}: {error}"[:300],
            "raw": found["measured"],
        }


def halved(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The same with half the rows; None where there are none to leave out."""
    rows_of = arguments.get("batch", 1)
    if rows_of // 2 < arguments.get("accumulate", 1):  # a micro-batch of one row gets no smaller
        return None
    return {**arguments, "batch": rows_of // 2}


def _child(session: Session, one: Measurement, arguments: dict[str, Any], limit: float, spoil: str | None) -> Any:
    """What the process of a measurement says, or what became of it."""
    told = json.dumps({"function": one.function, "arguments": arguments, "gpu": not session.toy, "spoil": spoil})
    python = session.pythons.get(one.python or "", sys.executable)
    log = session.output / "logs" / f"{one.name}.txt"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    words = [python, "-m", "bench.gpu.child", told]
    with log.open("a") as errors:  # the batch that was too large stays in it
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
        return {"status": "timeout", "why": f"not done in {limit:.0f} s"}
    if line.endswith("\n"):
        return json.loads(line)
    code, said = process.returncode, log.read_text(errors="replace").strip().splitlines()
    why = f"ended with exit code {code}" + (f": {said[-1][:300]}" if said else "")
    memory = code in KILLED or any("out of memory" in text.lower() for text in said[-20:])
    return {"status": "memory" if memory else "failed", "why": why}


def _line(process: Any, limit: float) -> str | None:
    """The line that the process says; "" where it ends without one, None where it takes longer."""
    held = process.stdin
    process.stdin = None  # stays open: its end tells the process that we are gone
    try:
        return process.communicate(timeout=max(limit, 1))[0]
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.held = held


def _kill(process: Any) -> None:
    """End the process with all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (getattr(process, "held", None), process.stdout):
        if pipe:
            pipe.close()


def _environment(session: Session, one: Measurement) -> dict[str, str]:
    paths = [str(EXPERIMENTS), str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")]
    share = {} if "XLA_CLIENT_MEM_FRACTION" in os.environ else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    given = {**share, **os.environ}  # PyTorch takes what it needs, too
    given |= QUIET
    given["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if one.section == RIGHT:  # several at once, with the CPU beside the device
        platforms = given.get("JAX_PLATFORMS", "")
        given["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        given |= {"JAX_PLATFORMS": f"{platforms},cpu"} if platforms and "cpu" not in platforms else {}
    return {**given, **(_toy(session.output, given) if session.toy else {})}


def _toy(output: Path, given: dict[str, str]) -> dict[str, str]:
    """Of a rehearsal: the CPU, and what is compiled is kept, since most rows compile the same."""
    cache = {"JAX_COMPILATION_CACHE_DIR": given.get("JAX_COMPILATION_CACHE_DIR", str(output / "cache"))}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_ENABLE_COMPILATION_CACHE": "true"}
    return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": QUICK, **cache}


def _why(row: dict[str, Any]) -> str:
    return f": {row['why']}" if "why" in row else ""
