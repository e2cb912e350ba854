"""A whole run of fine-tuning, from a :class:`RunConfig` to a directory that holds everything worth keeping.

::

    RUN/config.yaml      every key, as resolved         RUN/adapter/           the result, in PEFT's layout
    RUN/metrics.jsonl    one line a step                RUN/checkpoints/       Orbax: adapters, optimizer, step, key
    RUN/loss.png         RUN/norms.png                  RUN/tensorboard/       the same numbers
    RUN/stability.png    where stability_every asks     RUN/summary.json       accuracies, losses, minutes

With ``select: best`` RUN/adapter is that of the best evaluation (RUN/best holds the candidates until the end), else
that of the last step; the checkpoints are always the last ones. The same command again goes on from the newest
checkpoint, bit for bit; another configuration never writes into it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax import checkpoint, parallel, report
from stablelora_jax.build import make_optimizer, make_schedule
from stablelora_jax.data import Loader, batch_of_step, make_loader, statistics, tokenised, training_texts
from stablelora_jax.describe import describe
from stablelora_jax.errors import InputError
from stablelora_jax.evaluate import Scorer, make_scorer
from stablelora_jax.files import write_whole
from stablelora_jax.intercept import Adapted, adapted
from stablelora_jax.interop.peft import require_peft_form, save_peft
from stablelora_jax.log import RunLog
from stablelora_jax.models.pretrained import base_directory, load_pretrained
from stablelora_jax.models.untie import untie
from stablelora_jax.optimizer_config import shrink_ratio, trained_part
from stablelora_jax.run_config import RunConfig
from stablelora_jax.run_directory import SUMMARY, create, locate, read_summary
from stablelora_jax.selection import best_step, exhausted
from stablelora_jax.summary import story, summarize
from stablelora_jax.tasks import load_questions
from stablelora_jax.train import TrainState, init_state, make_stability_view, make_train_step
from stablelora_jax.transform import init_adapters
from stablelora_jax.validate import HeldOut, held_out, validate

BEST = "best"  # in a run directory: the adapters that were the best so far, by step


class Job(NamedTuple):
    """What a run works with, once everything is loaded; nothing in it changes."""

    config: RunConfig
    directory: Path
    base: str  # where the base came from
    model: Adapted
    params: Any  # replicated over the devices
    loader: Loader
    held: HeldOut  # validation
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    start: TrainState
    scorer: Scorer


def run(config: RunConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do the run, or what is left of it, and give its summary.

    Raises:
      InputError: anything that the user gave and that cannot be used, before anything is trained.
    """
    began = time.monotonic()
    directory = locate(config)
    if summary := read_summary(directory):
        say(f"{directory} is finished; its adapter is in {directory / 'adapter'}. Another seed or output= trains anew.")
        return summary
    job = _prepare(config, directory, say)
    create(directory, config)
    with closing(checkpoint.open_manager(directory / "checkpoints", keep=config.keep_checkpoints)) as manager:
        state = job.start if manager.latest_step() is None else TrainState(*checkpoint.restore(manager, job.start))
        log = RunLog(directory, int(state.step), config.steps, job.schedule, config.lora)
        log.write_data(statistics(job.loader, config.steps))
        say(f"{'training' if state.step == 0 else f'going on from step {state.step}'} in {directory}")
        if config.evaluate and log.evaluation(0) is None:
            log.write_evaluation(0, _evaluate(job, job.start.adapters))
        state = _train(job, state, manager, log)
        kept = _keep_adapter(job, state, log)
    log.close()
    report.draw(directory)
    summary = summarize(config, log, int(state.step), kept, time.monotonic() - began)
    write_whole(directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
    for line in story(config, log, job.held.questions, summary):
        say(line)
    say(f"{state.step} steps in {summary['minutes']} minutes; adapter, pictures and numbers are in {directory}")
    return summary


def _prepare(config: RunConfig, directory: Path, say: Callable[[str], None]) -> Job:
    base = config.model.path or str(base_directory())
    if config.batch_size % jax.device_count():
        raise InputError(f"batch_size {config.batch_size} does not divide over {jax.device_count()} devices")
    model, params = load_pretrained(base, dtype=jnp.dtype(config.model.dtype))
    if config.model.untie:
        model, params = untie(model, params)
    if model.tokenizer is None:
        raise InputError(f"{base} has no tokenizer")
    if config.length > model.config.max_position_embeddings:
        raise InputError(f"length {config.length} is more than the {model.config.max_position_embeddings} of {base}")
    loader = _load(config, model.tokenizer, say)
    if int(loader.store.tokens.max()) >= model.config.vocab_size:
        raise InputError(f"the tokenizer of {base} gives ids beyond its vocabulary of {model.config.vocab_size}")
    held = held_out(config, model.tokenizer, load_questions(config.task, "validation") if config.evaluate else [])
    key = jax.random.key(config.seed)
    adapters = init_adapters(key, params, config.lora)
    require_peft_form(adapters, config.lora, params)
    say(describe(params, adapters, config.lora))
    schedule = make_schedule(config)
    tx = make_optimizer(config, adapters)
    start = jax.tree.map(np.asarray, init_state(adapters, tx, jax.random.fold_in(key, 1)))
    low_rank, placed = adapted(model, config.lora), parallel.replicate(params)
    return Job(config, directory, base, low_rank, placed, loader, held, schedule, tx, start, make_scorer(low_rank))


def _load(config: RunConfig, tokenizer: Any, say: Callable[[str], None]) -> Loader:
    """The training split as batches, with a line that says what there is."""
    data, texts = config.data, training_texts(load_questions(config.task, "train"))
    store = tokenised(
        tokenizer,
        texts,
        length=config.length,
        truncate=data.truncate,
        chat=data.chat_template,
        cache=data.cache,
        say=say,
    )
    loader = make_loader(
        store, batching=data.batching, length=config.length, batch_size=config.batch_size, seed=config.seed
    )
    if store.cut:
        side = {"left": "beginning", "right": "end"}[data.truncate]
        say(f"{store.cut} of {len(texts)} training texts are longer than length={config.length}: their {side} is cut")
    n = statistics(loader, config.steps)
    say(
        f"{n['texts']} texts in {n['rows']} rows: {n['tokens']} tokens, {n['loss_tokens']} of them learnt; "
        f"{n['padding']:.1%} of a batch is padding; {config.steps} steps are {n['epochs']:.2f} epochs"
    )
    return loader


def _train(job: Job, state: TrainState, manager: Any, log: RunLog) -> TrainState:
    """Step to the end; metrics are read one step late, so that the device never waits for them."""
    config, step = job.config, make_train_step(job.model, job.tx, trained_part(job.config.optimizer))
    view = make_stability_view(job.model, shrink_ratio(config.optimizer))
    copies, number, last = parallel.stack_copies(state), int(state.step), None
    while not _evaluated_and_done(job, number, copies, log):
        batch = batch_of_step(job.loader, number, jax.process_index(), jax.process_count())
        batch, number = parallel.split_rows(batch), number + 1
        due = config.stability_every is not None and number % config.stability_every == 0
        before = jax.tree.map(jnp.copy, copies.adapters) if due else None  # the step donates its own
        copies, metrics = step(copies, job.params, batch)
        if due:
            metrics["stability"] = view(before, copies.adapters, metrics["latches"], job.params, batch)
        if last is not None:
            log.write_step(number - 1, parallel.first_copy(last))
        last = metrics
        saved = number % config.checkpoint_every == 0 or number == config.steps
        if saved or _evaluates(config, number):
            log.write_step(number, parallel.first_copy(last))
            last = None
        if saved:
            checkpoint.save(manager, number, parallel.first_copy(copies))
    checkpoint.save(manager, number, parallel.first_copy(copies))  # where it has stopped early
    return parallel.first_copy(copies)


def _evaluates(config: RunConfig, step: int) -> bool:
    every = config.evaluate_every
    return config.evaluate and (step == config.steps or (every is not None and step > 0 and step % every == 0))


def _evaluated_and_done(job: Job, step: int, copies: TrainState, log: RunLog) -> bool:
    """Evaluate after step ``step`` where that is due and not logged yet; whether the run ends here.

    An adapter that is the best so far is written before its evaluation is logged, so what the log says is there.
    """
    config = job.config
    if _evaluates(config, step) and log.evaluation(step) is None:
        adapters = parallel.first_copy(copies.adapters)
        result = _evaluate(job, adapters)
        if config.select == "best" and best_step(log.evaluations() | {step: result}, config.metric) == step:
            _save(job, job.directory / BEST / str(step), adapters, step)
        log.write_evaluation(step, result)
    return step == config.steps or exhausted(log.evaluations(), config.metric, config.patience)


def _evaluate(job: Job, adapters: Any) -> dict[str, Any]:
    return validate(
        job.scorer,
        job.params,
        parallel.replicate(adapters),
        job.model.model.tokenizer,
        job.held,
        length=job.config.length,
        batch_size=job.config.batch_size,
    )


def _keep_adapter(job: Job, state: TrainState, log: RunLog) -> int:
    """Put the last adapter, or where so configured the best, into RUN/adapter; the step that it is of."""
    step, adapter = int(state.step), job.directory / "adapter"
    best = best_step(log.evaluations(), job.config.metric) if job.config.select == "best" else None
    if best is None:
        _save(job, adapter, state.adapters, step)
        return step
    if not adapter.exists():
        os.rename(job.directory / BEST / str(best), adapter)
    shutil.rmtree(job.directory / BEST, ignore_errors=True)
    return best


def _save(job: Job, directory: Path, adapters: Any, step: int) -> None:
    config = job.config
    metadata = {"optimizer": asdict(config.optimizer), "steps": step, "task": config.task.name}
    save_peft(directory, adapters, config.lora, base_model=job.base, params=job.params, metadata=metadata)
