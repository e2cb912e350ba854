"""What asynchronous checkpoints cost the training loop: ``python experiments/saving_cost.py [key=value ...]``.

On a Llama of 15M parameters with random weights: blocks of training steps, in turn with and without one save at their
beginning. The cost of a save is what a block with it takes longer, and from above: the seconds that the loop is held
(the state is fetched, its checksums made) plus the processor time of writing, as if no core were free.
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
    """The keys."""

    rounds: int = option(7, "blocks with and as many without a save")
    block: int = option(10, "steps of a block")
    every: int = option(100, "steps between two saves, for the share")
    rows: int = option(8, "rows of a step")
    length: int = option(256, "tokens of a row")
    rank: int = option(8, "of the adapters of all linear modules")


class Loop:
    """The state of a run that goes on from block to block."""

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
        ones, places = np.ones_like(tokens), np.broadcast_to(np.arange(settings.length, dtype=np.int32), tokens.shape)
        self.batch = self.layout.split(Batch(tokens, ones, ones, np.ascontiguousarray(places)))

    def run(self, steps: int) -> None:
        """Steps, until they are done."""
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.params, self.batch)
        jax.block_until_ready(metrics["loss"])


def measure(settings: SavingConfig) -> list[str]:
    """The lines of the report."""
    loop = Loop(settings)
    loop.run(2)
    found: dict[str, list[float]] = {"with": [], "without": [], "held": [], "processor": []}
    with tempfile.TemporaryDirectory() as folder, checkpoint.open_manager(Path(folder) / "c") as manager:
        for number in range(-1, settings.rounds):
            plain = _timed(lambda: loop.run(settings.block))
            began = time.perf_counter()
            held = _timed(lambda n=number: checkpoint.save(manager, 2 * n + 2, loop.layout.fetch(loop.state)))
            loop.run(settings.block)
            saving = time.perf_counter() - began
            checkpoint.wait(manager)
            processor = time.process_time()
            checkpoint.save(manager, 2 * number + 3, loop.layout.fetch(loop.state))
            checkpoint.wait(manager)
            if number >= 0:  # the first round warms up
                row: dict[str, Any] = {"without": plain, "with": saving, "held": held}
                for name, value in {**row, "processor": time.process_time() - processor}.items():
                    found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    step = medians["without"] / settings.block
    longer = statistics.median(a - b for a, b in zip(found["with"], found["without"], strict=True))
    size = sum(x.nbytes for x in jax.tree.leaves(loop.layout.fetch(loop.state)))
    share = 100 / (settings.every * step)
    bound = (medians["held"] + medians["processor"]) * share
    return [
        f"Llama-15M, all-linear, r={settings.rank}, {settings.rows} x {settings.length} tokens; "
        f"{size / 1e6:.1f} MB saved",
        "",
        f"a step {1e3 * step:.0f} ms; the loop is held {1e3 * medians['held']:.0f} ms a save; "
        f"a save takes {1e3 * medians['processor']:.0f} ms of processor time",
        "",
        f"a save makes {settings.block} steps {1e3 * longer:+.0f} ms longer (median of {settings.rounds}): "
        f"{longer * share:.2f} % of the loop at one save per {settings.every} steps; at most {bound:.2f} %",
    ]


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> int:
    """Parse the command line, measure, print."""
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
