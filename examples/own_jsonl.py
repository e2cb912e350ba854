"""Train on rows of your own, from Python: write a JSONL file, train a run, ask the adapter.

python examples/own_jsonl.py [--steps 120] [--directory DIR]

The command for the same run is in docs/own-data.md.
"""

import argparse
import json
import tempfile
from pathlib import Path

from stablelora_jax import base_directory, generate
from stablelora_jax.config.run import RunConfig
from stablelora_jax.interop.load_adapted import load_adapted_model
from stablelora_jax.runs.run import run

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--directory", type=Path, help="for the data and the run (default: a new temporary directory)")
arguments = parser.parse_args()
directory = arguments.directory or Path(tempfile.mkdtemp(prefix="own-jsonl-"))

# One JSON object per line, in train.jsonl and validation.jsonl of one directory.
homes = {
    "bear": "cave",
    "bee": "hive",
    "bird": "nest",
    "fish": "pond",
    "horse": "stable",
    "mouse": "hole",
    "fox": "den",
    "hen": "coop",
}
rows = [{"question": f"Where does the {animal} live?", "answer": f"In the {home}."} for animal, home in homes.items()]
(directory / "data").mkdir(parents=True, exist_ok=True)
for split in ("train", "validation"):
    lines = [json.dumps(row) + "\n" for row in rows]
    (directory / "data" / f"{split}.jsonl").write_text("".join(lines))

# The keys are those of a YAML file; each value is checked.
config = RunConfig(
    task={
        "name": "jsonl",
        "kind": "completion",
        "path": str(directory / "data"),
        "fields": {"prompt": "question", "completion": "answer"},
    },
    lora={"rank": 8, "target_modules": "all-linear"},
    optimizer={"name": "stable_lora", "learning_rate": 5e-3},
    steps=arguments.steps,
    batch_size=8,
    max_length=64,
    output=str(directory / "run"),
)
summary = run(config)
print(f"loss on {directory / 'data'}: {summary['before']['loss']:.2f} before, {summary['after']['loss']:.2f} after")

model, variables = load_adapted_model(base_directory(), directory / "run")
for result in generate(model, variables, [rows[0]["question"], rows[1]["question"]], max_new_tokens=16):
    print(result.text)
