"""One measurement as a process of its own: ``python -m bench.gpu.child '{"function": ..., "arguments": ...}'``.

The result is one line of JSON on what was stdout; whatever libraries print goes to stderr. The process ends itself,
with all that it has started, when the one that started it is gone.
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
    """Measure what the command line says."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    told = json.loads(sys.argv[1])
    print(json.dumps(answer(**told), default=float), file=answers, flush=True)
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # a library's threads may not keep the row waiting


def answer(function: str, arguments: dict[str, Any], gpu: bool, spoil: str | None = None) -> dict[str, Any]:
    """``{"status", "why" or "measured"}`` of ``module:function``; with ``gpu``, a CPU's measurement does not count."""
    module, name = function.split(":")
    try:
        _spoil(spoil)
        measured = getattr(import_module(module), name)(**arguments)
    except Exception as error:
        if absent := _absent(error):
            return {"status": "absent", "why": absent}
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        short = next(iter(str(error).strip().splitlines()), "")
        memory = isinstance(error, MemoryError) or any(word in text.lower() for word in MEMORY)
        return {"status": "memory" if memory else "failed", "why": f"{type(error).__name__}: {short}"[:300]}
    if gpu and measured.get("device") == "cpu":
        return {"status": "failed", "why": "no GPU was seen: it was measured on the CPU", "raw": measured}
    return {"status": "done", "measured": measured}


def _absent(error: Exception) -> str | None:
    """What to say of a package that is not installed; None for any other error, and for modules that have moved."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").split(".")[0]
    if not package:
        return str(error)
    return None if find_spec(package) else f"{package} is not installed here"


def _spoil(how: str | None) -> None:
    """Fail as a measurement may fail."""
    if how == "crash":
        os.abort()
    if how == "hang":
        time.sleep(10**6)
    if how == "memory":
        import jax.numpy as jnp

        jnp.zeros(2**48).block_until_ready()


def _end_with_parent() -> None:
    """The parent holds the other end of stdin, and never writes."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
