"""A fine-tuning run, from a :class:`RunConfig` to a run directory.

::

    RUN/config.yaml      every key, as resolved         RUN/adapter/           the result, in PEFT's layout
    RUN/metrics.jsonl    one line a step                RUN/checkpoints/       Orbax: adapters, optimizer, step, key
    RUN/loss.png         RUN/norms.png                  RUN/tensorboard/       the same numbers
    RUN/stability.png    where stability_every asks     RUN/summary.json       accuracies, losses, minutes

With ``select: best`` RUN/adapter is that of the best evaluation, whose checkpoint is kept, else that of the last step.
The same command resumes the run from the newest checkpoint, bit for bit; another configuration never writes into it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from stablelora_jax.config.run import RunConfig
from stablelora_jax.interop.base_record import base_record
from stablelora_jax.interop.peft import save_peft
from stablelora_jax.parallel import barrier, initialize, is_primary, require_devices, to_host
from stablelora_jax.runs import legacy, plots
from stablelora_jax.runs.directory import create, locate, lock, read_summary
from stablelora_jax.runs.early_stopping import best_step
from stablelora_jax.runs.files import ADAPTER, CHECKPOINTS, LOCK, SUMMARY, has_adapter
from stablelora_jax.runs.log import RunLog, open_log
from stablelora_jax.runs.loop import metadata_of, train
from stablelora_jax.runs.prepare import TrainingSetup, prepare
from stablelora_jax.runs.summary import summarize, summary_lines
from stablelora_jax.runs.trackers import require_installed
from stablelora_jax.runs.training_data import training_digest, with_kind
from stablelora_jax.training import checkpoint
from stablelora_jax.training.step import TrainState
from stablelora_jax.utils import compile_cache, tree
from stablelora_jax.utils.errors import InputError, RunError, brief
from stablelora_jax.utils.files import partial_name, put_new, write_whole, writing
from stablelora_jax.utils.signals import catch_signals


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn errors for too little host or device memory into a RunError of one line."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        less = "a smaller batch_size, max_length or lora.rank, or a larger gradient_accumulation_steps, needs less"
        raise RunError(f"there is too little memory ({brief(error)}): {less} (see --dry-run)") from None


@memory_errors()
def run(config: RunConfig, log_fn: Callable[[str], None] = print) -> dict[str, Any]:
    """Start the run, or resume it, and return its summary.

    Raises:
      InputError: an input that cannot be used; raised before training.
      RunError: the disk, the memory or values that are not finite end the run; what was saved is complete.
      Interrupted: SIGTERM or SIGINT came during training; everything is saved.
    """
    began = time.monotonic()
    compile_cache.enable()
    if config.distributed is not None:
        initialize(**asdict(config.distributed))
    require_devices()
    log_fn = log_fn if is_primary() else _silent
    config = with_kind(config, log_fn)
    located = locate(config)
    directory = located.path
    if (summary := read_summary(directory)) and has_adapter(directory) and not located.changes:
        if not config.accept_changes:
            _require_same_data(config, directory, summary)
        log_fn(
            f"{directory} is finished; its adapter is in {directory / ADAPTER}. Another seed or output= trains anew."
        )
        return summary
    if is_primary() and (directory / LOCK).exists():
        with lock(directory):  # before minutes are spent on loading
            pass
    require_installed(config.trackers)
    checkpoints = directory / CHECKPOINTS
    checkpoint.require_undamaged(checkpoints)
    newest = checkpoint.latest(checkpoints)
    setup = prepare(config, directory, log_fn, resumes=newest is not None)
    if newest is not None and newest > setup.config.steps:
        raise InputError(f"{directory} has done {newest} steps, more than steps={setup.config.steps}: raise steps")
    with ExitStack() as stack:
        if is_primary():
            stack.enter_context(lock(directory))
            if checkpoint.latest(checkpoints) != newest:
                raise InputError(f"another process has written to {directory} in the meantime: start again")
        state = setup.start if newest is None else restored(setup, checkpoints, newest, config.accept_changes)
        if newest == setup.config.steps and located.changes and has_adapter(directory):
            raise InputError(f"{directory} has done all {newest} steps, none is left for what has changed: raise steps")
        if is_primary():
            create(located, config, newest or 0)
        barrier("the run directory is there")
        log = stack.enter_context(closing(open_run_log(setup, newest or 0)))
        state = _train(setup, state, checkpoints, log, log_fn)
        require_update(state)
        adapter_step = keep_adapter(setup, state, checkpoints, log)
    return finish(setup, log, int(state.step), adapter_step, time.monotonic() - began, log_fn)


def _require_same_data(config: RunConfig, directory: Path, summary: Mapping[str, Any]) -> None:
    """Refuse a finished run whose local training data are not those that it was trained on."""
    known = (summary.get("data") or {}).get("digest")
    path = getattr(config.task, "path", None)
    if known is None or path is None:
        return
    try:
        found = training_digest(config)
    except InputError:  # the data are gone; the run is finished all the same
        return
    if found != known:
        raise InputError(
            f"{directory} is finished, and the training data in {path} have changed since: "
            "choose another output= to train on them"
        )


def open_run_log(setup: TrainingSetup, step: int, *, progress: bool = True) -> RunLog:
    """The log of a run at ``step``, with the statistics of its data; ``progress`` shows the progress.

    Raises:
      InputError: as ``open_log``; or the run was begun with other data.
    """
    config = setup.config
    log = open_log(
        setup.directory,
        step,
        config.steps,
        setup.schedule,
        config.lora,
        trackers=config.trackers,
        writes=is_primary(),
        progress=progress,
    )
    log.write_data(setup.data, accept_changes=config.accept_changes)
    return log


def restored(setup: TrainingSetup, checkpoints: Path, step: int, accept_changes: bool) -> TrainState:
    """The state of a run at a checkpoint, host arrays.

    Raises:
      InputError: as ``checkpoint.restore``.
    """
    return legacy.restore(checkpoints, setup.start, step, metadata_of(setup, step), accept_changes=accept_changes)


def _train(
    setup: TrainingSetup, state: TrainState, checkpoints: Path, log: RunLog, log_fn: Callable[[str], None]
) -> TrainState:
    config = setup.config

    def best() -> int | None:
        return best_step(log.history.evaluations, config.metric)

    log_fn(f"{'training' if state.step == 0 else f'going on from step {state.step}'} in {setup.directory}")
    with (
        catch_signals() as received,
        checkpoint.open_manager(checkpoints, keep=config.keep_checkpoints, best=best) as manager,
    ):
        state = train(setup, state, manager, log, received)
        checkpoint.wait(manager)
    return state


def require_update(state: TrainState) -> None:
    """Refuse a run of which no step was applied.

    Raises:
      RunError: it is one.
    """
    if 0 < int(state.step) == int(state.skipped):
        raise RunError(
            f"none of the {int(state.step)} steps was applied, since loss, gradient or update was not finite in each: "
            "nothing has changed, and no adapter is written. Try a smaller lora.alpha, learning_rate or "
            "max_grad_norm with another output="
        )


def keep_adapter(setup: TrainingSetup, state: TrainState, checkpoints: Path, log: RunLog) -> int:
    """Write the last adapter, or with ``select: best`` the best, to RUN/adapter, and return its step."""
    config, step = setup.config, int(state.step)
    saved = {step, *checkpoint.steps(checkpoints)}  # of another metric, the best may no longer be saved
    known = {own: found for own, found in log.history.evaluations.items() if own in saved}
    best = best_step(known, config.metric) if config.select == "best" else None
    if best not in (None, step):
        state = legacy.restore(checkpoints, setup.start, best, {**metadata_of(setup, best)}, accept_changes=True)
        step = best
    params, base = _exportable(setup), base_record(setup.params, setup.base)
    if is_primary() and not has_adapter(setup.directory):
        metadata = {"optimizer": asdict(config.optimizer), "steps": step, "task": config.task.name, "base": base}
        metadata |= {"dtype": config.model.dtype, "untie": config.model.untie}
        metadata |= {"quantize": config.model.quantize} if config.model.quantize else {}
        partial = partial_name(setup.directory / ADAPTER)
        try:
            finished = setup.allocation.finished
            adapters, spec = (
                (state.adapters, config.lora)
                if finished is None
                else finished(state.adapters, config.lora, params=params)
            )
            save_peft(partial, adapters, spec, base_model=setup.base, params=params, metadata=metadata)
            with writing(setup.directory / ADAPTER):
                put_new(partial, setup.directory / ADAPTER)
        except InputError as error:
            raise RunError(f"{error}; step {state.step} is saved, and the same command goes on from it") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return step


def _exportable(setup: TrainingSetup) -> Any:
    """The base, with embedding and head (which an adapter file may hold) fetched to the host in a multi-process run."""
    params = setup.params
    for path in (("model", "embed_tokens"), ("lm_head",)):
        if jax.process_count() > 1 and tree.get_in(setup.start.adapters, path) is not None:
            params = tree.set_in(params, path, to_host(tree.get_in(params, path)))
    return params


def finish(
    setup: TrainingSetup, log: RunLog, steps: int, adapter_step: int, seconds: float, log_fn: Callable[[str], None]
) -> dict[str, Any]:
    """Write the pictures and the summary, and log the result."""
    summary = summarize(setup.config, log, steps, adapter_step, seconds, setup.validation_set.questions)
    if is_primary():
        try:
            plots.draw(setup.directory)
        except InputError as error:  # a picture that no run has drawn; the summary is written all the same
            log_fn(f"no pictures: {error}")
        with writing(setup.directory / SUMMARY):
            write_whole(setup.directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
    for line in summary_lines(setup.config, log, setup.validation_set.questions, summary):
        log_fn(line)
    log_fn(f"{steps} steps in {summary['minutes']} minutes; adapter, pictures and numbers are in {setup.directory}")
    return summary


def _silent(text: str) -> None:
    """The log function of all processes but the first."""
