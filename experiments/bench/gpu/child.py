"""Runs one measurement in a child process: ``python -m bench.gpu.child '{"function": ..., "arguments": ...}'``.

The result is one line of JSON on the original stdout; output of libraries goes to stderr. When the parent process dies,
the child kills its whole process group.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from importlib.util import find_spec
from typing import Any

MEMORY = ("resource_exhausted", "out of memory", "outofmemory", "cuda_error_out_of_memory")


def main() -> None:
    """Run the measurement that the command line describes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    print(json.dumps(run_measurement(**request), default=float), file=output, flush=True)
    output.close()
    sys.stderr.flush()
    os._exit(0)  # does not wait for threads of libraries


def run_measurement(function: str, arguments: dict[str, Any], gpu: bool, spoil: str | None = None) -> dict[str, Any]:
    """Call ``module:function`` and return its row's ``status`` with ``measured`` or ``why``.

    Args:
      function: ``module:function``.
      arguments: its keyword arguments.
      gpu: whether the measurement has to run on a GPU; one on a CPU is then ``failed``.
      spoil: a failure to inject, see :data:`bench.gpu.suite.FAILURES`.
    """
    module, name = function.split(":")
    try:
        _inject_failure(spoil)
        measured = getattr(import_module(module), name)(**arguments)
    except Exception as error:
        if absent := _missing_package(error):
            return {"status": "absent", "why": absent}
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        short = next(iter(str(error).strip().splitlines()), "")
        memory = isinstance(error, MemoryError) or any(word in text.lower() for word in MEMORY)
        return {"status": "memory" if memory else "failed", "why": f"{type(error).__name__}: {short}"[:300]}
    if gpu and measured.get("device") == "cpu":
        return {"status": "failed", "why": "no GPU found: measured on the CPU", "raw": measured}
    return {"status": "done", "measured": measured}


def _missing_package(error: Exception) -> str | None:
    """The message for a package that is not installed; None for any other error (a missing module in a package too)."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").split(".")[0]
    if not package:
        return str(error)
    return None if find_spec(package) else f"{package} is not installed here"


def _inject_failure(how: str | None) -> None:
    """Fail on purpose: crash, hang or run out of memory."""
    if how == "crash":
        os.abort()
    if how == "hang":
        time.sleep(10**6)
    if how == "memory":
        import jax.numpy as jnp

        jnp.zeros(2**48).block_until_ready()


def _end_with_parent() -> None:
    """Kill the process group when stdin closes: the parent holds its other end open and never writes."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
