"""Kill a run at random moments, start it again each time, and compare it with one that nobody disturbed.

``python tests/runs/kill_and_resume.py [--optimizer lora_rite] [--kills 20] [--steps 60] [--seed 0]`` prints where it
killed and what is equal; ``test_kill_and_resume.py`` runs a short form. Some kills wait for a checkpoint that is half
written, most for a random step and then a random moment in it; some come while the run starts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "task.train_limit=200",
    "task.validation_limit=8",
    "data.batching=pack",
    "max_length=128",
    "batch_size=16",
    "gradient_accumulation_steps=2",
    "lora.rank=4",
    "lora.dropout=0.2",
    "lora.target_modules=all-linear",
    "evaluate_every=9",
    "checkpoint_every=4",
    "schedule.warmup_steps=5",
    "stability_every=10",
]

WHEN = ["step", "write", "step", "start", "step", "write", "step"]


def command(directory: Path, optimizer: str, steps: int) -> list[str]:
    own = {"stable_lora": ["optimizer.shrink_ratio=0.02", "optimizer.learning_rate=0.01"]}.get(optimizer, [])
    script = str(ROOT / "experiments" / "train.py")
    return [
        sys.executable,
        script,
        f"optimizer.name={optimizer}",
        *own,
        f"steps={steps}",
        *SETTINGS,
        f"output={directory}",
    ]


def environment(scratch: Path) -> dict[str, str]:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    two = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": two, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **flags, **cache}


def last_step(directory: Path) -> int:
    """The newest step that the log names."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def half_written(directory: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any("tmp" in path.name for path in (directory / "checkpoints").glob("*"))


def killed(words: list[str], scratch: Path, directory: Path, draw: random.Random, when: str) -> str:
    """Start the run and kill it ``when``: in a "start", a "step" or a "write". Where that was, or that it ended."""
    goal, metrics, began = last_step(directory) + draw.randint(0, 2), directory / "metrics.jsonl", time.time()
    with (scratch / "log.txt").open("ab") as log:
        process = subprocess.Popen(words, env=environment(scratch), stdout=log, stderr=log)
    while process.poll() is None:
        logs = metrics.exists() and metrics.stat().st_mtime > began
        if when == "start" or (when == "step" and logs and last_step(directory) >= goal):
            time.sleep(draw.uniform(0.5, 4) if when == "start" else draw.uniform(0, 0.1))
            break
        if when == "write" and half_written(directory):
            break
        time.sleep(0.002)
    if process.poll() is not None:
        return "ended"
    process.send_signal(signal.SIGKILL)
    process.wait()
    where = "while a checkpoint was written" if half_written(directory) else "between checkpoints"
    return f"{where}, with {last_step(directory)} steps logged"


def records(directory: Path) -> list[dict[str, Any]]:
    """What is logged, without the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def contents(directory: Path) -> dict[str, Any]:
    """The bits that must be equal: the final adapter, the whole last state, and every logged number."""
    import orbax.checkpoint as ocp
    from safetensors.numpy import load_file

    with ocp.CheckpointManager((directory / "checkpoints").absolute()) as manager:
        newest = manager.latest_step()
    with ocp.PyTreeCheckpointer() as reader:
        state = reader.restore((directory / "checkpoints" / str(newest) / "state").absolute())
    import jax

    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return {"adapter": load_file(directory / "adapter" / "adapter_model.safetensors"), "state": leaves}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def check(optimizer: str, kills: int, steps: int, seed: int, scratch: Path) -> Counter[str]:
    """Run undisturbed and with ``kills`` kills; raises AssertionError where anything differs."""
    whole, disturbed, draw = scratch / "whole", scratch / "disturbed", random.Random(seed)
    subprocess.run(command(whole, optimizer, steps), env=environment(scratch), check=True, capture_output=True)
    counts: Counter[str] = Counter()
    words = command(disturbed, optimizer, steps)
    while sum(counts.values()) < kills:
        where = killed(words, scratch, disturbed, draw, WHEN[sum(counts.values()) % len(WHEN)])
        if where == "ended":
            break
        print(f"{optimizer}: killed {where}", flush=True)
        counts[where.split(",")[0]] += 1
    subprocess.run(words, env=environment(scratch), check=True, capture_output=True)
    once = Counter(record["step"] for record in records(disturbed) if "loss" in record)
    assert once == Counter(range(1, steps + 1)), "each step is logged once"
    assert records(disturbed) == records(whole), "what is logged"
    mine, theirs = contents(disturbed), contents(whole)
    assert equal(mine["adapter"], theirs["adapter"]), "the adapter"
    assert equal(mine["state"], theirs["state"]), "adapters, optimizer state and latches"
    assert not half_written(disturbed), "half-written checkpoints are cleared away"
    print(f"{optimizer}: {sum(counts.values())} kills ({dict(counts)}); {steps} steps, all bits equal", flush=True)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", action="append", help="may be given more than once; default: both")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in given.optimizer or ["stable_lora", "lora_rite"]:
        with tempfile.TemporaryDirectory() as folder:
            check(name, given.kills, given.steps, given.seed, Path(folder))
