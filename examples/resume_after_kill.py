"""Kill a run and start it again: the same command resumes, and every logged number is that of a run without a kill.

python examples/resume_after_kill.py [--steps 40] [--directory DIR]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--directory", type=Path, help="for the two runs (default: a new temporary directory)")
arguments = parser.parse_args()
directory = arguments.directory or Path(tempfile.mkdtemp(prefix="resume-"))
SETTINGS = ["batch_size=8", "max_length=64", "checkpoint_every=5", "evaluate=false", f"steps={arguments.steps}"]


def command(run):
    """The same words each time: whether a run starts or resumes is seen from its directory."""
    return [sys.executable, "-m", "stablelora_jax", "train", *SETTINGS, f"output={run}"]


def logged(run):
    """The records of the steps, without the clock."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


subprocess.run(command(directory / "whole"), check=True, stdout=subprocess.DEVNULL)

process = subprocess.Popen(command(directory / "killed"), stdout=subprocess.DEVNULL)
while process.poll() is None and not any(line["step"] >= arguments.steps // 2 for line in logged(directory / "killed")):
    time.sleep(0.01)
process.kill()  # SIGKILL: no chance to save anything
process.wait()
print(f"killed after step {logged(directory / 'killed')[-1]['step']}")

subprocess.run(command(directory / "killed"), check=True)
adapters = [load_file(directory / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "killed")]
same = all(adapters[0][name].tobytes() == adapters[1][name].tobytes() for name in adapters[0])
print(
    f"records equal: {logged(directory / 'whole') == logged(directory / 'killed')}, adapters equal in every bit: {same}"
)
