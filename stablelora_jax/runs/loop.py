"""The training loop: steps and, between two steps, logging, evaluation and checkpoints.

Between two steps come, in this order, the metrics of the steps before, an evaluation, a checkpoint. The log and the
checkpoints are therefore never ahead of each other, and whatever ends a run, the same command resumes it from the
newest checkpoint with the same result.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stablelora_jax.config.optimizer import shrink_ratio
from stablelora_jax.config.run import RunConfig
from stablelora_jax.data import batch_of_step, place_of_step, rows_of_step, texts_of_rows
from stablelora_jax.lora.leaves import split_frozen
from stablelora_jax.parallel import make_agreement, to_host
from stablelora_jax.rank_allocation.restart import restart
from stablelora_jax.runs.build import make_hyperparams, make_objective
from stablelora_jax.runs.early_stopping import best_step, patience_exceeded
from stablelora_jax.runs.log import RunLog
from stablelora_jax.runs.prepare import TrainingSetup
from stablelora_jax.runs.validation import validate
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import TrainState, make_stability_view, make_train_step
from stablelora_jax.utils.errors import Interrupted, RunError

RESTART = 2**31  # folded into the key of a restart, which is then none of a row's
PendingMetrics = tuple[int, Callable[[], Any]]  # the number of a step, and its metrics


class StepResult(NamedTuple):
    """What a step has given. Both functions are called before the next step, if at all."""

    placed: Callable[[], TrainState]  # the state after the step, on the devices
    metrics: Callable[[], Any]  # host arrays; waits for the step
    save: bool = False  # whether the state is to be saved, whatever the configuration says


def train(
    setup: TrainingSetup, state: TrainState, manager: Any, log: RunLog, received: Callable[[], int]
) -> TrainState:
    """Train to the last step; metrics are read one step late, so that the device never waits for them.

    Args:
      setup: of the run.
      state: the first state, host arrays.
      manager: of the checkpoints.
      log: opened at the step of ``state``.
      received: gives the signal that asks the run to end, or 0.

    Returns:
      The last state, host arrays; it is saved.

    Raises:
      Interrupted: a signal came; the step under way is finished and saved.
      RunError: too many consecutive steps were not finite (the state is saved), or something cannot be written.
    """
    step, fetch, placed = make_step(setup), setup.layout.fetch, setup.layout.place_state(state)
    every = setup.config.checkpoint_every
    control = run_control(setup, int(state.step), lambda: placed, manager, log, received, every=every)
    try:
        number = next(control)
        while True:
            placed, metrics = step(placed, number)
            number = control.send(StepResult(lambda: placed, partial(fetch, metrics)))  # noqa: B023
    except StopIteration as end:
        found: TrainState = end.value
        return found


def run_control(
    setup: TrainingSetup,
    number: int,
    placed: Callable[[], TrainState],
    manager: Any,
    log: RunLog,
    received: Callable[[], int],
    *,
    every: int | None,
) -> Generator[int, StepResult | None, TrainState]:
    """All of a run but its steps: logging, evaluation, checkpoints and the end.

    Yields the number of steps so far where the next step is to be computed, and is sent its :class:`StepResult`; or
    None, where none is computed: then it looks again at ``received``. Returns and raises as :func:`train`.

    Args:
      setup: of the run.
      number: of steps so far.
      placed: gives the state on the devices.
      manager: of the checkpoints.
      log: opened at ``number``.
      received: gives the signal that asks the run to end, or 0.
      every: steps between checkpoints; None: saved is when it is asked for, and at the end.
    """
    config, agree = setup.config, make_agreement()
    saving, evaluating = _Clock(config.checkpoint_minutes), _Clock(config.evaluate_minutes)
    saved = checkpoint.latest(manager)  # the step of the newest checkpoint: none is saved again
    pending: PendingMetrics | None = None
    asked, answer = False, agree((received(), 0, 0))
    while True:
        stop, save_now, evaluate_now = answer()
        evaluates = _evaluates(config, number, evaluate_now) and number not in log.history.evaluations
        saves = number > 0 and (asked or bool(save_now) or (every is not None and number % every == 0))
        if pending and (evaluates or saves or stop or number == config.steps):
            _read(setup, placed, number, manager, log, pending)
            pending = None
        if evaluates:
            stop = _evaluate(setup, placed(), number, log, received) or stop
            evaluating.reset()
        done = number == config.steps or patience_exceeded(log.history.evaluations, config.metric, config.patience)
        best = evaluates and best_step(log.history.evaluations, config.metric) == number
        if (saves or stop or done or best) and (saved is None or number > saved):
            _save(setup, placed(), number, manager)
            saved = number
            saving.reset()
        if stop:
            checkpoint.wait(manager)
            name = signal.Signals(stop).name
            raise Interrupted(stop, f"{name} after step {number}, which is saved: the same command goes on from there")
        if done:
            found: TrainState = setup.layout.fetch(placed())
            return found
        answer = agree((received(), saving.due(), evaluating.due()))
        result = yield number
        if result is None:
            answer = agree((received(), 0, 0))
            continue
        placed, asked = result.placed, result.save
        new = (number + 1, result.metrics)
        if pending:
            _read(setup, placed, number + 1, manager, log, pending, new)
        number, pending = number + 1, new


def evaluate(setup: TrainingSetup, adapters: Any, stop: Callable[[], int]) -> dict[str, Any]:
    """Evaluate ``adapters``, placed on the devices, on the validation set.

    Raises:
      InterruptedError: ``stop`` gives a signal, and no other process waits for this one.
    """

    def compute(rows: Any) -> Any:
        if stop() and jax.process_count() == 1:
            raise InterruptedError
        return setup.compute(setup.params, {"lora": adapters}, rows)

    parts = setup.layout.parts
    rows = -(-max(setup.config.batch_size, 4 * parts) // parts) * parts
    return validate(
        compute, setup.model.model.tokenizer, setup.validation_set, length=setup.config.max_length, rows=rows
    )


class _Clock:
    """Whether ``minutes`` have passed; never where they are None."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.reset()

    def reset(self) -> None:
        self.began = time.monotonic()

    def due(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.began >= 60 * self.minutes


def make_step(setup: TrainingSetup) -> Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]:
    """``(state, number of steps so far) -> (state, metrics)``, with the stability terms where they are due."""
    config, layout, own = setup.config, setup.layout, setup.allocation
    parts: dict[str, Any] = {"trained": setup.trained, "seen": own.seen, "penalty": own.penalty}
    parts |= {"objective": make_objective(config), "accumulate": config.gradient_accumulation_steps}
    step = make_train_step(setup.model, setup.tx, layout, **parts)
    view = make_stability_view(setup.model, shrink_ratio(config.optimizer), layout)

    def step_with_stability(state: TrainState, number: int) -> tuple[TrainState, dict[str, Any]]:
        if number in own.restarts:
            state = layout.place_state(restarted(setup, layout.fetch(state), number))
        batch = layout.place_rows(lambda part: batch_of_step(setup.loader, number, part), config.batch_size)
        due = config.stability_every is not None and (number + 1) % config.stability_every == 0
        before = jax.tree.map(jnp.copy, state.adapters) if due else None  # the step donates its own
        state, metrics = step(state, setup.params, batch, setup.hyperparams)
        if due:
            metrics["stability"] = view(before, state.adapters, metrics["latches"], setup.params, batch)
        return state, metrics

    return step_with_stability


def restarted(setup: TrainingSetup, state: TrainState, number: int) -> TrainState:
    """``state``, host arrays, as step ``number`` of a rank allocation that restarts there begins with it."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(state.key)), number), RESTART)
    adapters = setup.allocation.restarts[number](state.adapters, key, setup.params)
    tx = setup.tx(make_hyperparams(setup.config, adapters))
    return to_host(state._replace(adapters=adapters, opt_state=restart(tx, state.opt_state, split_frozen(adapters)[0])))


def _evaluates(config: RunConfig, step: int, now: int) -> bool:
    every = config.evaluate_every
    due = step in (0, config.steps) or bool(now) or (every is not None and step % every == 0)
    return config.evaluate and due


def _evaluate(setup: TrainingSetup, placed: TrainState, step: int, log: RunLog, received: Callable[[], int]) -> int:
    """Evaluate and log it; where a signal comes in between, nothing is logged and the signal is given."""
    try:
        found = (setup.first_evaluation if step == 0 else None) or evaluate(setup, placed.adapters, received)
        if step == 0:
            setup.first_evaluation.update(found)
        log.write_evaluation(step, found)
    except InterruptedError:
        return received()
    return 0


def _read(
    setup: TrainingSetup,
    placed: Callable[[], TrainState],
    number: int,
    manager: Any,
    log: RunLog,
    pending: PendingMetrics,
    new: PendingMetrics | None = None,
) -> None:
    """Log the metrics of a step; ``placed`` gives the state after ``number`` steps: that step, or ``new``, the next."""
    step, metrics = pending[0], pending[1]()
    log.write_step(step, metrics)
    bad = int(metrics["consecutive_skips"])
    if bad < setup.config.max_consecutive_errors:
        return
    if new:  # what is saved is logged, too
        log.write_step(new[0], new[1]())
    _save(setup, placed(), number, manager)
    checkpoint.wait(manager)
    loader = setup.loader
    rows = rows_of_step(step - 1, loader.batch_size, loader.rows, loader.seed)
    texts = [i for row in texts_of_rows(loader, rows) for i in row]
    raise RunError(
        f"loss or gradient was not finite in {bad} steps in a row, {step - bad + 1} to {step}; nothing changed "
        f"in them, and the adapters of step {step - bad} are saved in checkpoint {number}. Step {step} read the "
        f"training texts {', '.join(map(str, texts[:64]))}{', ...' if len(texts) > 64 else ''} (from 0). "
        "Try a smaller learning_rate or max_grad_norm with another output="
    )


def _save(setup: TrainingSetup, placed: TrainState, number: int, manager: Any) -> None:
    """Begin to save the state after ``number`` steps."""
    if not manager.directory.is_dir():  # Orbax would make it again, of a run that has lost the rest
        raise RunError(f"cannot write checkpoint {number}: {manager.directory} is gone; put it back or begin anew")
    checkpoint.save(manager, number, setup.layout.fetch(placed), metadata_of(setup, number))


def metadata_of(setup: TrainingSetup, step: int) -> dict[str, Any]:
    """What a checkpoint of ``step`` says beside the state; the place in the data is a function of the step."""
    place = place_of_step(step, setup.loader.batch_size, setup.loader.rows)
    return {**setup.metadata, "data": {**setup.metadata["data"], **place._asdict()}}
