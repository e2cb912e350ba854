"""Sides of ``bench.py train`` as processes, stepped in turn: what the machine does meanwhile happens to all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.work import Work, dumped
from stablelora_jax.utils.errors import InputError, RunError, brief

EXPERIMENTS = Path(__file__).parents[1]
OURS = "stablelora_jax"
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MODULES = {OURS: "bench.ours", "peft": "bench.peft", "tunix": "bench.tunix"}  # first words of names


class Worker(NamedTuple):
    """A side that is ready."""

    name: str
    process: subprocess.Popen[str]
    about: dict[str, Any]


@contextmanager
def started(name: str, work: Work, together: bool, pythons: Mapping[str, str]) -> Iterator[Worker]:
    """The process of a side, warmed up; it ends with the block."""
    peer, *more = name.split()
    alone = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if together else {}
    command = [pythons.get(peer, sys.executable), "-m", MODULES[peer], dumped(work), *more]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    paths = os.pathsep.join(filter(None, [str(EXPERIMENTS), os.environ.get("PYTHONPATH")]))
    try:
        process = subprocess.Popen(command, **pipes, env={**os.environ, **QUIET, **alone, "PYTHONPATH": paths})
    except OSError as error:
        raise InputError(f"{name}: {command[0]} cannot be run: {brief(error)}") from None
    try:
        print(f"{name}: making the model, warming up", file=sys.stderr)
        yield Worker(name, process, answer(name, process))
    finally:
        process.kill()
        process.communicate()


def answer(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that a side says.

    Raises:
      InputError: the side cannot do this work, and says why.
      RunError: it has ended.
    """
    line = process.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise RunError(f"{name} ended with exit code {process.wait()}; what it said is above")
    try:
        found = json.loads(line)
    except ValueError:
        raise InputError(f"{name}: its interpreter is no Python, it said {line.strip():.100}") from None
    if "error" in found:
        raise InputError(f"{name}: {found['error']}")
    return found


def told(worker: Worker, line: str) -> dict[str, Any]:
    """What a side answers to ``line``; raises what :func:`answer` does."""
    with suppress(BrokenPipeError):  # it has ended: the answer says how
        worker.process.stdin.write(line + "\n")  # type: ignore[union-attr]
        worker.process.stdin.flush()  # type: ignore[union-attr]
    return answer(worker.name, worker.process)


def measured(
    names: list[str], work: Work, steps: int, rounds: int, apart: bool, pythons: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Of each side what it says of itself, the seconds of a step in each round, and its memory; peers may fail.

    ``pythons`` are the interpreters of peers that are not run by this one.
    """
    pythons = pythons or {}
    if apart and len(names) > 1:
        return {k: v for name in names for k, v in measured([name], work, steps, rounds, True, pythons).items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = [found for name in names if (found := able(stack, name, work, len(names) > 1, pythons))]
        for turn in range(rounds):
            for worker in workers if turn % 2 == 0 else workers[::-1]:
                found = told(worker, str(steps))
                times[worker.name].append(found["seconds"] / steps)
                said = f"{1e3 * times[worker.name][-1]:.1f} ms a step, loss {found['loss']:.3f}"
                print(f"round {turn + 1} of {rounds}: {worker.name}: {said}", file=sys.stderr)
        return {w.name: {**w.about, "round_seconds": times[w.name], **told(w, "")} for w in workers}


def able(stack: ExitStack, name: str, work: Work, together: bool, pythons: Mapping[str, str]) -> Worker | None:
    """The worker that :func:`started` gives, or None for a peer that could not do it (out of memory, say)."""
    try:
        return stack.enter_context(started(name, work, together, pythons))
    except RunError as error:
        if name == OURS:
            raise
        print(f"left out: {error}", file=sys.stderr)
        return None
