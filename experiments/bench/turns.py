"""Runs the sides of ``bench.py train`` as worker processes, interleaved, so that load on the machine affects all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.work import Workload, to_json
from stablelora_jax.utils.errors import InputError, RunError, brief

EXPERIMENTS = Path(__file__).parents[1]
OURS = "stablelora_jax"
QUIET_ENV = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MODULES = {OURS: "bench.ours", "peft": "bench.peft", "tunix": "bench.tunix"}  # by the first word of a side's name


class Worker(NamedTuple):
    """The process of a side after its warm-up."""

    name: str
    process: subprocess.Popen[str]
    metadata: dict[str, Any]


@contextmanager
def start_worker(name: str, work: Workload, together: bool, interpreters: Mapping[str, str]) -> Iterator[Worker]:
    """Start the process of a side and wait for its warm-up; the process is killed on exit."""
    peer, *more = name.split()
    no_preallocation = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if together else {}
    command = [interpreters.get(peer, sys.executable), "-m", MODULES[peer], to_json(work), *more]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    paths = os.pathsep.join(filter(None, [str(EXPERIMENTS), os.environ.get("PYTHONPATH")]))
    try:
        env = {**os.environ, **QUIET_ENV, **no_preallocation, "PYTHONPATH": paths}
        process = subprocess.Popen(command, **pipes, env=env)
    except OSError as error:
        raise InputError(f"{name}: {command[0]} cannot be run: {brief(error)}") from None
    try:
        print(f"{name}: creating the model, warming up", file=sys.stderr)
        yield Worker(name, process, read_reply(name, process))
    finally:
        process.kill()
        process.communicate()


def read_reply(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next reply of a side.

    Raises:
      InputError: the side reports that it cannot run the workload, or its interpreter is not Python.
      RunError: the process has exited.
    """
    line = process.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise RunError(f"{name} ended with exit code {process.wait()}; its output is above")
    try:
        found = json.loads(line)
    except ValueError:
        raise InputError(f"{name}: its interpreter is not Python: it printed {line.strip():.100}") from None
    if "error" in found:
        raise InputError(f"{name}: {found['error']}")
    return found


def request(worker: Worker, line: str) -> dict[str, Any]:
    """Send ``line`` to a side and return its reply; raises as :func:`read_reply` does."""
    with suppress(BrokenPipeError):  # the process has exited: read_reply reports it
        worker.process.stdin.write(line + "\n")  # type: ignore[union-attr]
        worker.process.stdin.flush()  # type: ignore[union-attr]
    return read_reply(worker.name, worker.process)


def measure_sides(
    names: list[str],
    work: Workload,
    steps: int,
    rounds: int,
    separately: bool,
    interpreters: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the sides, interleaved round by round or ``separately``; a peer that fails is left out.

    Args:
      names: the sides; a name is a key of :data:`MODULES`, optionally followed by arguments.
      work: the training step.
      steps: timed steps per round.
      rounds: number of rounds.
      separately: run one side after the other instead of interleaving them.
      interpreters: the Python interpreters of peers that need one other than the current.

    Returns:
      For each side its metadata, ``round_seconds`` (seconds per step in each round) and its memory.

    Raises:
      InputError: a side cannot run the workload.
      RunError: our side has exited.
    """
    interpreters = interpreters or {}
    if separately and len(names) > 1:
        alone = (measure_sides([name], work, steps, rounds, True, interpreters) for name in names)
        return {name: side for sides in alone for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = [found for name in names if (found := start_or_skip(stack, name, work, len(names) > 1, interpreters))]
        for number in range(rounds):
            for worker in workers if number % 2 == 0 else workers[::-1]:
                found = request(worker, str(steps))
                times[worker.name].append(found["seconds"] / steps)
                line = f"{1e3 * times[worker.name][-1]:.1f} ms per step, loss {found['loss']:.3f}"
                print(f"round {number + 1} of {rounds}: {worker.name}: {line}", file=sys.stderr)
        return {w.name: {**w.metadata, "round_seconds": times[w.name], **request(w, "")} for w in workers}


def start_or_skip(
    stack: ExitStack, name: str, work: Workload, together: bool, interpreters: Mapping[str, str]
) -> Worker | None:
    """The worker of :func:`start_worker`, or None for a peer that exited during its warm-up (out of memory, say)."""
    try:
        return stack.enter_context(start_worker(name, work, together, interpreters))
    except RunError as error:
        if name == OURS:
            raise
        print(f"skipped: {error}", file=sys.stderr)
        return None
