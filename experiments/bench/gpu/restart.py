"""Checks that a run that is killed and resumed ends with the same adapter, bit for bit, as an uninterrupted run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu.about import ROOT

SETTINGS = ["batch_size=8", "evaluate=false", "lora.dropout=0.1", "schedule.warmup_steps=2", "task.train_limit=100"]
SETTINGS += ["trackers=[]"]  # their packages may be missing


def resume(*, steps: int, toy: bool = False) -> dict[str, Any]:
    """Train the package's base on its generated task twice, once with a SIGKILL halfway, and compare the adapters."""
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = (Path(folder) / name for name in ("whole", "resumed"))
        _wait(*_start(whole, steps, folder))
        killed, _ = _start(resumed, steps, folder)
        while killed.poll() is None and _logged(resumed) < steps // 2:
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        at = _logged(resumed)
        _wait(*_start(resumed, steps, folder))
        adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    equal = adapters[0] == adapters[1]
    return {"ok": equal and 0 < at < steps, "equal_to_the_bit": equal, "killed_after_step": at, "steps": steps}


def _start(output: Path, steps: int, folder: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a run; returns the process and its stderr file. All runs share a compile cache, hence the same programs."""
    keys = [f"steps={steps}", f"checkpoint_every={max(1, steps // 4)}", f"output={output}", *SETTINGS]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, **cache, "XLA_FLAGS": flags}
    command = [sys.executable, str(ROOT / "experiments" / "train.py"), *keys]
    log = Path(folder) / "stderr.txt"
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=sys.stderr, stderr=file), log


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the run to end.

    Raises:
      RuntimeError: it failed.
    """
    process.wait()
    sys.stderr.write(text := log.read_text())
    if process.returncode:
        raise RuntimeError((text.strip().splitlines() or ["the run failed"])[-1])


def _logged(output: Path) -> int:
    """The number of steps in the log of a run."""
    log = output / "metrics.jsonl"
    return log.read_bytes().count(b'"loss"') if log.exists() else 0
