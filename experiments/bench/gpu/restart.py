"""A run that is killed and started again ends with the adapter of one that nobody disturbed, to the bit."""

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
SETTINGS += ["trackers=[]"]  # whose packages may be missing


def resume(*, steps: int, toy: bool = False) -> dict[str, Any]:
    """Train twice, once with a SIGKILL in the middle, on the base of the package and its generated task."""
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = (Path(folder) / name for name in ("whole", "cut"))
        _end(*_started(whole, steps, folder))
        killed, _ = _started(cut, steps, folder)
        while killed.poll() is None and _logged(cut) < steps // 2:
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        at = _logged(cut)
        _end(*_started(cut, steps, folder))
        adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, cut)]
    equal = adapters[0] == adapters[1]
    return {"ok": equal and 0 < at < steps, "equal_to_the_bit": equal, "killed_after_step": at, "steps": steps}


def _started(output: Path, steps: int, folder: str) -> tuple[subprocess.Popen[bytes], Path]:
    """The training run, and where it says what goes wrong; programs are kept, so that all runs have the very same."""
    keys = [f"steps={steps}", f"checkpoint_every={max(1, steps // 4)}", f"output={output}", *SETTINGS]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, **cache, "XLA_FLAGS": flags}
    command = [sys.executable, str(ROOT / "experiments" / "train.py"), *keys]
    said = Path(folder) / "said.txt"
    with said.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=sys.stderr, stderr=file), said


def _end(process: subprocess.Popen[bytes], said: Path) -> None:
    process.wait()
    sys.stderr.write(text := said.read_text())
    if process.returncode:
        raise RuntimeError((text.strip().splitlines() or ["the run failed"])[-1])


def _logged(output: Path) -> int:
    """Steps in the log."""
    log = output / "metrics.jsonl"
    return log.read_bytes().count(b'"loss"') if log.exists() else 0
