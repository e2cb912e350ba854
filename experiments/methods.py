"""All methods of ``configs/methods`` in one table: ``python experiments/methods.py --output DIR [key=value ...]``.

Each method is trained by the ordinary entry with a few seeds, in ``DIR/METHOD/seed=N``. ``DIR/methods.md`` and
``DIR/methods.json`` have for each its trainable parameters, the accuracy (mean and standard deviation over seeds), the
time of a step as a multiple of LoRA's, the bytes of adapters and optimizer state, and those of temporaries in the
compiled step. LoRA's own time is LoRA against LoRA: it shows how far to trust the others. The same command goes on
where it was killed; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stablelora_jax import config, split_frozen
from stablelora_jax.config.run import RunConfig
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.runs.dry_run import dry_run
from stablelora_jax.runs.loop import make_step
from stablelora_jax.runs.prepare import TrainingSetup, prepare
from stablelora_jax.runs.records import plain
from stablelora_jax.runs.run import run
from stablelora_jax.runs.summary import environment
from stablelora_jax.studies.significance import mean_std
from stablelora_jax.utils import compile_cache
from stablelora_jax.utils.errors import InputError, RunError
from stablelora_jax.utils.files import read_json_object, write_whole, writing

FOLDER = Path(__file__).parents[1] / "configs" / "methods"
BASELINE = "lora"
TOGETHER = 8  # methods whose programs are kept: the memory maps of a process are limited
STEPS, ROUNDS = 10, 7  # of a timing; timings of the method and of LoRA take turns
HEAD = "| method | trainable | accuracy | step time | state | temporaries |\n| --- | ---: | ---: | ---: | ---: | ---: |"


def quiet(text: str) -> None:
    """Takes a line of a run's log."""


def load(method: str, output: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of ``method`` with ``overrides``, whose run directory is ``output``."""
    found: RunConfig = config.load(RunConfig, str(FOLDER / f"{method}.yaml"), [*overrides, f"output={output}"])
    return found


def trainable(setup: TrainingSetup) -> int:
    """The number of the adapters' numbers that get a gradient."""
    own = split_frozen(setup.start.adapters)[0]
    reached = jax.grad(lambda own: sum(leaf.sum() for leaf in jax.tree.leaves(setup.trained(own))))(own)
    return sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(reached))


def timer(setup: TrainingSetup) -> Callable[[], float]:
    """A function that gives the seconds of ``STEPS`` steps, on the same batches each time; the first calls compile."""
    step, state = make_step(setup), setup.layout.place_state(setup.start)

    def seconds() -> float:
        nonlocal state
        began = time.perf_counter()
        for number in range(STEPS):
            state, _ = step(state, number)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    seconds(), seconds()
    return seconds


def costs(own: RunConfig, baseline: Callable[[], float]) -> dict[str, Any]:
    """What ``own`` trains, and what its step takes: bytes of state and of temporaries, and time beside ``baseline``."""
    setup = prepare(own, Path(), quiet)
    seconds = timer(setup)
    rounds = [(seconds(), baseline()) for _ in range(ROUNDS)]
    return {
        "trainable": trainable(setup),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves((setup.start.adapters, setup.start.opt_state))),
        "temporary_bytes": dry_run(own, quiet)["temporaries"],
        "milliseconds": 1e3 * statistics.median(mine for mine, _ in rounds) / STEPS,
        "relative_time": statistics.median(mine / other for mine, other in rounds),
    }


def measured(place: Path, own: RunConfig, keys: Sequence[str], baseline: Callable[[], Any]) -> dict[str, Any]:
    """:func:`costs`, from ``place`` where they were measured with the same ``keys`` before."""
    file = place / "costs.json"
    if file.is_file() and (found := read_json_object(file)).get("keys") == list(keys):
        return found
    found = {"keys": list(keys), **costs(own, baseline())}
    with writing(file):
        place.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(plain(found), indent=2) + "\n")
    return found


def accuracies(method: str, output: Path, seeds: int, keys: Sequence[str]) -> dict[str, Any]:
    """Train ``method`` with each seed; accuracies on the validation set, and why runs have failed, by seed."""
    values, failed = [], {}
    for seed in range(seeds):
        try:
            summary = run(load(method, output / method / f"seed={seed}", [*keys, f"seed={seed}"]), quiet)
            values.append(float(summary["after"]["acc"]))
        except RunError as error:
            failed[seed] = str(error)
    mean, std = mean_std(values)
    return {"accuracies": values, "mean": mean, "std": std, "failed": failed}


def row(name: str, found: Mapping[str, Any]) -> str:
    """A line of the table."""
    mean, std = (None if found[key] is None else 100 * found[key] for key in ("mean", "std"))
    accuracy = "-" if mean is None else f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
    accuracy += f" ({len(found['failed'])} failed)" if found["failed"] else ""
    state, temporaries = (f"{found[key] / 2**20:.2f} MiB" for key in ("state_bytes", "temporary_bytes"))
    time = f"{found['relative_time']:.2f}"
    return f"| `{name}` | {found['trainable']:,} | {accuracy} | {time} | {state} | {temporaries} |"


def write(output: Path, rows: Mapping[str, Any], command: Sequence[str]) -> str:
    """Write both files, and return the table."""
    text = "\n".join([HEAD, *(row(name, found) for name, found in rows.items())])
    own = {"command": list(command), "methods": rows, "environment": environment()}
    with writing(output / "methods.json"):
        write_whole(output / "methods.json", json.dumps(plain(own), indent=2) + "\n")
        write_whole(output / "methods.md", text + "\n")
    return text


def work(arguments: argparse.Namespace) -> None:
    """Measure method after method, and write the table after each."""
    names = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]
    chosen = arguments.methods.split(",") if arguments.methods else names
    if unknown := sorted(set(chosen) - set(names)):
        raise InputError(f"there is no method {unknown[0]}: {FOLDER} has {', '.join(names)}")
    if arguments.seeds < 1:
        raise InputError(f"--seeds must be at least 1, not {arguments.seeds}")
    compile_cache.enable()
    output, keys, rows = arguments.output, ["trackers=[]", *arguments.overrides], {}
    made: list[Callable[[], float]] = []

    def baseline() -> Callable[[], float]:
        made[:] = made or [timer(prepare(load(BASELINE, output, keys), Path(), quiet))]
        return made[0]

    for number, name in enumerate(chosen, 1):
        trained = accuracies(name, output, arguments.seeds, keys)
        own = load(name, output / name, keys)
        rows[name] = measured(output / name, own, keys, baseline) | trained
        text = write(output, rows, [*sys.argv[:1], *chosen, *keys])
        print(text.splitlines()[-1], flush=True)
        if number % TOGETHER == 0:
            made.clear()
            jax.clear_caches()
    print(f"\n{text}\n\nin {output / 'methods.md'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the runs and the table")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    parser.add_argument("--methods", metavar="NAME,NAME", help="names of files of configs/methods (default: all)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of all runs, such as steps=200")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: work(arguments), interrupted="interrupted: the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
