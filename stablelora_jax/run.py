"""A whole run of fine-tuning, from a :class:`RunConfig` to a directory that holds everything worth keeping.

::

    RUN/config.yaml      every key, as resolved         RUN/adapter/           the result, in PEFT's layout
    RUN/metrics.jsonl    one line a step                RUN/checkpoints/       Orbax: adapters, optimizer, step, key
    RUN/loss.png         RUN/norms.png                  RUN/tensorboard/       the same numbers
    RUN/stability.png    where stability_every asks     RUN/summary.json       accuracies, losses, minutes

The same command again goes on from the newest checkpoint, bit for bit; another configuration never writes into it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax import checkpoint, parallel, report
from stablelora_jax.build import make_optimizer, make_schedule
from stablelora_jax.data import Example, make_batch, rows_of_step, training_examples
from stablelora_jax.describe import describe
from stablelora_jax.errors import InputError
from stablelora_jax.evaluate import Scorer, accuracies, answers, make_scorer, score_choices
from stablelora_jax.files import write_whole
from stablelora_jax.intercept import Adapted, adapted
from stablelora_jax.interop import save_peft
from stablelora_jax.log import RunLog
from stablelora_jax.models.pretrained import base_directory, load_pretrained
from stablelora_jax.models.untie import untie
from stablelora_jax.optimizer_config import shrink_ratio, trained_part
from stablelora_jax.run_config import RunConfig
from stablelora_jax.run_directory import SUMMARY, create, locate, read_summary
from stablelora_jax.summary import story, summarize
from stablelora_jax.tasks import load_questions
from stablelora_jax.tasks.question import Question
from stablelora_jax.train import TrainState, init_state, make_stability_view, make_train_step
from stablelora_jax.transform import init_adapters


class Job(NamedTuple):
    """What a run works with, once everything is loaded; nothing in it changes."""

    config: RunConfig
    directory: Path
    base: str  # where the base came from
    model: Adapted
    params: Any  # replicated over the devices
    examples: Sequence[Example]
    questions: Sequence[Question]  # validation
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
    manager = checkpoint.open_manager(directory / "checkpoints", keep=config.keep_checkpoints)
    state = job.start if manager.latest_step() is None else TrainState(*checkpoint.restore(manager, job.start))
    log = RunLog(directory, int(state.step), config.steps, job.schedule, config.lora)
    say(f"{'training' if state.step == 0 else f'going on from step {state.step}'} in {directory}")
    if config.evaluate and log.evaluation(0) is None:
        log.write_evaluation(0, _evaluate(job, job.start.adapters))
    state = _train(job, state, manager, log)
    if config.evaluate and log.evaluation(config.steps) is None:
        log.write_evaluation(config.steps, _evaluate(job, state.adapters))
    metadata = {"optimizer": asdict(config.optimizer), "steps": config.steps, "task": config.task.name}
    save_peft(
        directory / "adapter", state.adapters, config.lora, base_model=job.base, params=job.params, metadata=metadata
    )
    manager.close()
    log.close()
    report.draw(directory)
    summary = summarize(config, log, time.monotonic() - began)
    write_whole(directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
    for line in story(config, log, job.questions, summary):
        say(line)
    say(f"{config.steps} steps in {summary['minutes']} minutes; adapter, pictures and numbers are in {directory}")
    return summary


def _prepare(config: RunConfig, directory: Path, say: Callable[[str], None]) -> Job:
    base = config.model.path or str(base_directory())
    if config.batch_size % jax.local_device_count():
        raise InputError(f"batch_size {config.batch_size} does not divide over {jax.local_device_count()} devices")
    model, params = load_pretrained(base, dtype=jnp.dtype(config.model.dtype))
    if config.model.untie:
        model, params = untie(model, params)
    if model.tokenizer is None:
        raise InputError(f"{base} has no tokenizer")
    if config.length > model.config.max_position_embeddings:
        raise InputError(f"length {config.length} is more than the {model.config.max_position_embeddings} of {base}")
    examples = training_examples(model.tokenizer, load_questions(config.task, "train"), config.length)
    if max(max(example.tokens) for example in examples) >= model.config.vocab_size:
        raise InputError(f"the tokenizer of {base} gives ids beyond its vocabulary of {model.config.vocab_size}")
    if cut := sum(example.cut > 0 for example in examples):
        say(f"{cut} of {len(examples)} training texts are longer than length={config.length}: their beginning is cut")
    key = jax.random.key(config.seed)
    adapters = init_adapters(key, params, config.lora)
    say(describe(params, adapters, config.lora))
    schedule = make_schedule(config)
    tx = make_optimizer(config, adapters)
    start = jax.tree.map(np.asarray, init_state(adapters, tx, jax.random.fold_in(key, 1)))
    questions = load_questions(config.task, "validation") if config.evaluate else []
    low_rank, placed = adapted(model, config.lora), parallel.replicate(params)
    return Job(
        config, directory, base, low_rank, placed, examples, questions, schedule, tx, start, make_scorer(low_rank)
    )


def _train(job: Job, state: TrainState, manager: Any, log: RunLog) -> TrainState:
    """Step to the end; metrics are read one step late, so that the device never waits for them."""
    config, step = job.config, make_train_step(job.model, job.tx, trained_part(job.config.optimizer))
    view = make_stability_view(job.model, shrink_ratio(config.optimizer))
    copies, last = parallel.stack_copies(state), None
    for number in range(int(state.step), config.steps):
        rows = rows_of_step(number, config.batch_size, len(job.examples), config.seed)
        batch = parallel.split_rows(make_batch([job.examples[row] for row in rows]))
        due = config.stability_every is not None and (number + 1) % config.stability_every == 0
        before = jax.tree.map(jnp.copy, copies.adapters) if due else None  # the step donates its own
        copies, metrics = step(copies, job.params, batch)
        if due:
            metrics["stability"] = view(before, copies.adapters, metrics["latches"], job.params, batch)
        if last is not None:
            log.write_step(number, parallel.first_copy(last))
        last = metrics
        if (number + 1) % config.checkpoint_every == 0 or number + 1 == config.steps:
            log.write_step(number + 1, parallel.first_copy(last))
            last = None
            checkpoint.save(manager, number + 1, parallel.first_copy(copies))
    return parallel.first_copy(copies)


def _evaluate(job: Job, adapters: Any) -> dict[str, Any]:
    scores = score_choices(
        job.scorer,
        job.params,
        parallel.replicate(adapters),
        job.model.model.tokenizer,
        job.questions,
        length=job.config.length,
        rows=max(job.config.batch_size, 4 * jax.local_device_count()),
        progress=sys.stderr.isatty(),
    )
    return {**accuracies(scores, job.questions), "questions": len(scores), "answers": answers(scores)}
