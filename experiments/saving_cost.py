"""The cost of asynchronous checkpoints to the training loop: ``python experiments/saving_cost.py [key=value ...]``.

A Llama of 15M parameters with random weights is trained in blocks of steps, alternately without a save and with one at
the start. The cost of a save is the difference in time between two such blocks. An upper bound is the time that a save
blocks the loop (fetching the state, computing checksums) plus its CPU time, as if no core were idle.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench.optimizers import decoder, machine

from stablelora_jax import LoraSpec, adapted, config, init_adapters, stable_lora
from stablelora_jax.config import option
from stablelora_jax.data import Batch
from stablelora_jax.parallel import pmap_layout
from stablelora_jax.runs.cli import exit_code
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import init_state, make_train_step


@dataclass(frozen=True)
class SavingConfig:
    """The keys of the command line."""

    rounds: int = option(7, "blocks with a save, and as many without")
    block: int = option(10, "steps per block")
    every: int = option(100, "steps between two saves, to compute the cost as a share of the loop")
    rows: int = option(8, "rows per step")
    length: int = option(256, "tokens per row")
    rank: int = option(8, "LoRA rank, on all linear modules")


class Loop:
    """A training loop whose state is kept from block to block."""

    def __init__(self, settings: SavingConfig) -> None:
        self.layout = pmap_layout(jax.devices()[:1])
        model, shapes = decoder("llama-15m")
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda s: jnp.asarray(0.02 * rng.normal(size=s.shape), s.dtype), shapes)
        spec, tx = LoraSpec(target_modules="all-linear", rank=settings.rank), stable_lora(1e-4)
        adapters = init_adapters(jax.random.key(0), params, spec)
        self.params, self.step = self.layout.place_base(params), make_train_step(adapted(model, spec), tx, self.layout)
        self.state = self.layout.place_state(jax.tree.map(np.asarray, init_state(adapters, tx, jax.random.key(1))))
        tokens = rng.integers(0, 32000, (settings.rows, settings.length)).astype(np.int32)
        ones, positions = (
            np.ones_like(tokens),
            np.broadcast_to(np.arange(settings.length, dtype=np.int32), tokens.shape),
        )
        self.batch = self.layout.split(Batch(tokens, ones, ones, np.ascontiguousarray(positions)))

    def run(self, steps: int) -> None:
        """Run ``steps`` steps and wait for the last."""
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.params, self.batch)
        jax.block_until_ready(metrics["loss"])


def time_blocks(settings: SavingConfig, loop: Loop) -> dict[str, list[float]]:
    """The seconds of each round.

    ``without`` and ``with``: a block without and with a save; ``blocking``: the save's part in the loop; ``cpu``: the
    CPU time of a save while no step runs.
    """
    found: dict[str, list[float]] = {"with": [], "without": [], "blocking": [], "cpu": []}
    with tempfile.TemporaryDirectory() as folder, checkpoint.open_manager(Path(folder) / "c") as manager:
        for number in range(-1, settings.rounds):
            without = _timed(lambda: loop.run(settings.block))
            began = time.perf_counter()
            blocking = _timed(lambda n=number: checkpoint.save(manager, 2 * n + 2, loop.layout.fetch(loop.state)))
            loop.run(settings.block)
            saving = time.perf_counter() - began
            checkpoint.wait(manager)
            cpu = time.process_time()
            checkpoint.save(manager, 2 * number + 3, loop.layout.fetch(loop.state))
            checkpoint.wait(manager)
            cpu = time.process_time() - cpu
            if number >= 0:  # the first round is a warm-up
                for name, value in {"without": without, "with": saving, "blocking": blocking, "cpu": cpu}.items():
                    found[name].append(value)
    return found


def measure(settings: SavingConfig) -> list[str]:
    """Measure; returns the lines of the report."""
    loop = Loop(settings)
    loop.run(2)
    found = time_blocks(settings, loop)
    medians = {name: statistics.median(values) for name, values in found.items()}
    step = medians["without"] / settings.block
    longer = statistics.median(a - b for a, b in zip(found["with"], found["without"], strict=True))
    size = sum(x.nbytes for x in jax.tree.leaves(loop.layout.fetch(loop.state)))
    share = 100 / (settings.every * step)
    bound = (medians["blocking"] + medians["cpu"]) * share
    return [
        f"Llama-15M, all-linear, r={settings.rank}, {settings.rows} x {settings.length} tokens; "
        f"{size / 1e6:.1f} MB saved",
        "",
        f"step time {1e3 * step:.0f} ms; a save blocks the loop for {1e3 * medians['blocking']:.0f} ms "
        f"and takes {1e3 * medians['cpu']:.0f} ms of CPU time",
        "",
        f"a save adds {1e3 * longer:+.0f} ms to {settings.block} steps (median of {settings.rounds}): "
        f"{longer * share:.2f} % of the loop at one save per {settings.every} steps; upper bound {bound:.2f} %",
    ]


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> int:
    """Parse the command line, measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="keys:\n\n" + config.help_text(SavingConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    return exit_code(
        lambda: print("\n".join([machine(), "", *measure(config.load(SavingConfig, None, arguments.overrides))]))
    )


if __name__ == "__main__":
    sys.exit(main())
