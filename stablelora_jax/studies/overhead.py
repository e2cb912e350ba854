"""What the methods cost: the time of a training step, taken in turns, and bytes of optimizer state and of the step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from stablelora_jax.runs.dry_run import dry_run
from stablelora_jax.runs.loop import make_step
from stablelora_jax.runs.prepare import load_base, prepare
from stablelora_jax.studies.preset import Study
from stablelora_jax.training.step import TrainState

Step = Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]


def overhead(study: Study, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each method on the first task.

    ``milliseconds`` is the median time of a step over the rounds; ``relative`` the median over the rounds of the time
    divided by the baseline's in the same round, with its quartiles ``low`` and ``high``; ``state_bytes`` those of the
    optimizer state; ``step_bytes`` those of arguments and temporaries of the compiled step, for a device.
    """
    preset = study.preset
    configs = {name: study.point(study.task, name, rates[name], preset.seeds[0]).config for name in preset.methods}
    base = load_base(configs[preset.baseline])
    setups = {name: prepare(own, Path(), lambda text: None, base=base) for name, own in configs.items()}
    timed = {name: _Timed(make_step(own), own.layout.place_state(own.start)) for name, own in setups.items()}
    for _ in range(2):  # the first pass compiles
        for one in timed.values():
            one.run(preset.overhead_steps)
    rounds = [
        {name: one.run(preset.overhead_steps) for name, one in timed.items()} for _ in range(preset.overhead_rounds)
    ]
    found = []
    for name, setup in setups.items():
        shares = [seconds[name] / seconds[preset.baseline] for seconds in rounds]
        low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
        median = statistics.median(seconds[name] for seconds in rounds) / preset.overhead_steps
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(setup.start.opt_state))
        needs = dry_run(configs[name], lambda text: None)
        row = {"method": name, "milliseconds": 1e3 * median, "relative": middle, "low": low, "high": high}
        found.append(row | {"state_bytes": int(state), "step_bytes": int(needs["total"])})
    return found


class _Timed:
    """The steps of one method, on the same batches in every round."""

    def __init__(self, step: Step, state: TrainState) -> None:
        self.step, self.state = step, state

    def run(self, steps: int) -> float:
        """Seconds of ``steps`` steps on the first batches."""
        jax.block_until_ready(self.state)
        began = time.perf_counter()
        for number in range(steps):
            self.state, _ = self.step(self.state, number)
        jax.block_until_ready(self.state)
        return time.perf_counter() - began
