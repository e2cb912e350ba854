"""The arrays of the jobs under way, and the rounds in which all of them make a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from stablelora_jax.data import Batch, batch_of_step, longest_row, most_segments
from stablelora_jax.jobs.kinds import Kind, leaf_shapes, numbers_of
from stablelora_jax.jobs.plan import (
    Pass,
    choose_tokens,
    loss_room,
    loss_tokens,
    passes,
    room,
    row_lengths,
    rows_of_pass,
)
from stablelora_jax.jobs.step import init_states, make_jobs_step
from stablelora_jax.lora.apply import Adapted, adapted
from stablelora_jax.lora.combine.union import covering_spec
from stablelora_jax.runs.loop import StepResult
from stablelora_jax.runs.prepare import TrainingSetup, configure_decoder
from stablelora_jax.training.step import TrainState


class Rounds:
    """The state of all slots on the devices, and which job holds which.

    Args:
      setups: of all jobs, also of those that wait.
      kinds: of the jobs.
      at_once: the number of jobs that are trained side by side.
      tokens: the room of a pass; None: chosen from the first batches.
    """

    def __init__(self, setups: Sequence[TrainingSetup], kinds: Sequence[Kind], at_once: int, tokens: int | None):
        self._setups, self._kinds, self._layout = setups, kinds, setups[0].layout
        self._loaders = [setup.loader for setup in setups]
        self._tokens = tokens or choose_tokens(self._loaders[:at_once], self._layout.parts)
        steps = max(setup.config.steps for setup in setups)
        self._numbers = [numbers_of(setup, steps) for setup in setups]
        self._slots: dict[int, tuple[int, int]] = {}  # of each job under way: kind and slot of the kind
        self._held = [[kind.jobs[0]] * kind.slots for kind in kinds]  # whose numbers each slot holds
        starts = [setup.start for setup in setups]
        self._states = list(self._layout.place_state(init_states(starts, kinds)))
        self._dtype = np.dtype(jax.tree.leaves(starts[0].adapters)[0].dtype)
        adapters = [start.adapters for start in starts]
        self._model = _model(setups, self._tokens)
        dropout = any(setup.config.lora.dropout for setup in setups)
        shapes = leaf_shapes(adapters)
        self._last, self._before = make_jobs_step(self._model, kinds, shapes, self._layout, dropout=dropout)
        at = lambda states, i: jax.tree.map(lambda x: x[i], states)  # noqa: E731
        put = lambda states, one, i: jax.tree.map(lambda x, y: x.at[i].set(y), states, one)  # noqa: E731
        self._take = self._layout.compile(at, ("state", "base"))
        self._put = self._layout.compile(put, ("state", "state", "base"), donate=(0,))
        self._place_numbers()

    def place(self, job: int, state: TrainState) -> None:
        """Give ``job`` a free slot of its kind, with ``state``, host arrays."""
        number = next(number for number, kind in enumerate(self._kinds) if job in kind.jobs)
        taken = {slot for own, slot in self._slots.values() if own == number}
        slot = min(set(range(self._kinds[number].slots)) - taken)
        self._slots[job], self._held[number][slot] = (number, slot), job
        self._states[number] = self._put(self._states[number], self._layout.place_state(state), np.int32(slot))
        self._place_numbers()

    def taken(self, job: int) -> TrainState:
        """A copy of the state of ``job``, on the devices."""
        number, slot = self._slots[job]
        found: TrainState = self._take(self._states[number], np.int32(slot))
        return found

    def step_of(self, job: int) -> int:
        """The number of steps of ``job`` so far."""
        return int(self._layout.fetch(self.taken(job).step))

    def free(self, job: int) -> None:
        """Take the slot from ``job``."""
        del self._slots[job]

    def step(self, numbers: Mapping[int, int], save: bool) -> dict[int, StepResult]:
        """One step of each job, of which ``numbers`` holds the steps so far."""
        batches = {job: batch_of_step(self._loaders[job], number) for job, number in numbers.items()}
        plan = passes({job: row_lengths(batch) for job, batch in batches.items()}, self._tokens, self._layout.parts)
        sums, space = None, sum(own.length * room(own.length, self._tokens, self._layout.parts) for own in plan)
        for own in plan:
            rows = self._layout.split(self._rows(own, batches))
            given = (tuple(self._states), sums, self._setups[0].params, rows, self._hyperparams)
            if own is not plan[-1]:
                sums = self._before(*given)
        states, metrics = self._last(*given, self._ends(numbers))
        self._states = list(states)
        used = sum(int((batch.segment_ids > 0).sum()) for batch in batches.values())
        fetched = cache(partial(self._layout.fetch, metrics))
        results = {}
        for job, batch in batches.items():
            counts = {"tokens": int((batch.segment_ids > 0).sum()), "loss_tokens": loss_tokens(batch)}
            own_metrics = partial(_metrics, fetched, *self._slots[job], {**counts, "padding": 1 - used / space})
            results[job] = StepResult(partial(self.taken, job), own_metrics, save)
        return results

    def _rows(self, own: Pass, batches: Mapping[int, Batch]) -> Any:
        first = np.cumsum([0, *(kind.slots for kind in self._kinds)])
        slots = {job: int(first[number]) + slot for job, (number, slot) in self._slots.items()}
        return rows_of_pass(
            own,
            batches,
            slots,
            tokens=self._tokens,
            parts=self._layout.parts,
            loss_positions=loss_room(self._loaders, own.length),
            dtype=self._dtype,
        )

    def _ends(self, jobs: Mapping[int, int]) -> tuple[np.ndarray, ...]:
        ends = tuple(np.zeros(kind.slots, bool) for kind in self._kinds)
        for job in jobs:
            number, slot = self._slots[job]
            ends[number][slot] = True
        return self._layout.place_base(ends)

    def _place_numbers(self) -> None:
        """Put the numbers of the jobs that hold slots on the devices."""
        stacked = [jax.tree.map(lambda *x: np.stack(x), *(self._numbers[job] for job in jobs)) for jobs in self._held]
        self._hyperparams = self._layout.place_base(tuple(stacked))


def _model(setups: Sequence[TrainingSetup], tokens: int) -> Adapted:
    """The decoder for the rows of all jobs, under a spec that covers them."""
    first, length = setups[0], max(longest_row(setup.loader) for setup in setups)
    spec = covering_spec([(setup.start.adapters, setup.config.lora) for setup in setups])
    rows = max(1, tokens // length // first.layout.parts) * first.layout.parts
    config = replace(first.config, batch_size=rows, gradient_accumulation_steps=1)
    largest = max((setup.start.adapters for setup in setups), key=lambda a: sum(x.size for x in jax.tree.leaves(a)))
    segments = max(most_segments(setup.loader) for setup in setups)
    decoder: Any = first.model.model
    decoder = configure_decoder(decoder, config, first.layout, first.params, largest, length=length, segments=segments)
    return adapted(decoder, spec)


def _metrics(fetched: Callable[[], Any], kind: int, slot: int, counts: Mapping[str, Any]) -> dict[str, Any]:
    return {**jax.tree.map(lambda x: x[slot], fetched()[kind]), **counts}
