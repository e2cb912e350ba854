"""A whole run of fine-tuning, from a :class:`RunConfig` to a directory that holds everything worth keeping.

::

    RUN/config.yaml      every key, as resolved         RUN/adapter/           the result, in PEFT's layout
    RUN/metrics.jsonl    one line a step                RUN/checkpoints/       Orbax: adapters, optimizer, step, key
    RUN/loss.png         RUN/norms.png                  RUN/tensorboard/       the same numbers
    RUN/summary.json     accuracies, losses, minutes

The same command again goes on from the newest checkpoint, bit for bit; another configuration never writes into it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax import checkpoint, parallel, report
from stablelora_jax.data import Example, make_batch, rows_of_step, training_examples
from stablelora_jax.describe import describe
from stablelora_jax.errors import InputError
from stablelora_jax.evaluate import Scorer, accuracies, answers, make_scorer, score_choices
from stablelora_jax.intercept import Adapted, adapted
from stablelora_jax.interop import save_peft
from stablelora_jax.log import RunLog
from stablelora_jax.models.pretrained import load_pretrained
from stablelora_jax.optimize import stable_lora
from stablelora_jax.run_config import RunConfig
from stablelora_jax.run_directory import METRICS, SUMMARY, claim, read_summary, write_whole
from stablelora_jax.tasks import load_questions
from stablelora_jax.tasks.question import Question
from stablelora_jax.train import TrainState, init_state, make_train_step
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
    directory = claim(config)
    if summary := read_summary(directory):
        say(f"{directory} is finished; its adapter is in {directory / 'adapter'}. Another seed or output= trains anew.")
        return summary
    job = _prepare(config, directory, say)
    manager = checkpoint.open_manager(directory / "checkpoints", keep=config.keep_checkpoints)
    state = job.start if manager.latest_step() is None else TrainState(*checkpoint.restore(manager, job.start))
    log = RunLog(directory, int(state.step), config.steps, job.schedule)
    say(f"{'training' if state.step == 0 else f'going on from step {state.step}'} in {directory}")
    if config.evaluate and log.evaluation(0) is None:
        log.write_evaluation(0, _evaluate(job, job.start.adapters))
    state = _train(job, state, manager, log)
    if config.evaluate and log.evaluation(config.steps) is None:
        log.write_evaluation(config.steps, _evaluate(job, state.adapters))
    save_peft(directory / "adapter", state.adapters, config.lora, base_model=job.base)
    manager.close()
    log.close()
    report.draw(directory)
    summary = _summary(job, log, time.monotonic() - began)
    write_whole(directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
    _tell(job, log, summary, say)
    return summary


def base_directory() -> Path:
    """The small base model that ships inside the package."""
    return Path(str(resources.files("stablelora_jax") / "assets" / "base"))


def make_schedule(config: RunConfig) -> optax.Schedule:
    """Learning rate by the number of updates so far: linear warm-up, then the named shape down to 0 at the end."""
    peak, warmup = config.optimizer.learning_rate, config.schedule.warmup_steps
    rest = max(1, config.steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule.name]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def make_optimizer(config: RunConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then Stable-LoRA around AdamW."""
    o = config.optimizer
    stable = stable_lora(schedule, o.shrink_ratio, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return stable if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), stable)


def _prepare(config: RunConfig, directory: Path, say: Callable[[str], None]) -> Job:
    base = config.model.path or str(base_directory())
    if config.batch_size % jax.local_device_count():
        raise InputError(f"batch_size {config.batch_size} does not divide over {jax.local_device_count()} devices")
    model, params = load_pretrained(base, dtype=jnp.dtype(config.model.dtype))
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
    tx = make_optimizer(config, schedule)
    start = jax.tree.map(np.asarray, init_state(adapters, tx, jax.random.fold_in(key, 1)))
    questions = load_questions(config.task, "validation") if config.evaluate else []
    low_rank, placed = adapted(model, config.lora), parallel.replicate(params)
    return Job(
        config, directory, base, low_rank, placed, examples, questions, schedule, tx, start, make_scorer(low_rank)
    )


def _train(job: Job, state: TrainState, manager: Any, log: RunLog) -> TrainState:
    """Step to the end; metrics are read one step late, so that the device never waits for them."""
    config, step = job.config, make_train_step(job.model, job.tx)
    copies, last = parallel.stack_copies(state), None
    for number in range(int(state.step), config.steps):
        rows = rows_of_step(number, config.batch_size, len(job.examples), config.seed)
        batch = parallel.split_rows(make_batch([job.examples[row] for row in rows]))
        copies, metrics = step(copies, job.params, batch)
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


def _summary(job: Job, log: RunLog, seconds: float) -> dict[str, Any]:
    losses = [record["loss"] for record in log.records if "loss" in record]
    device = jax.local_devices()[0]
    found = {"before": log.evaluation(0), "after": log.evaluation(job.config.steps)}
    return {
        "steps": job.config.steps,
        "loss_first_10": float(np.mean(losses[:10])),
        "loss_last_10": float(np.mean(losses[-10:])),
        **{name: {k: v for k, v in (e or {}).items() if k != "answers"} for name, e in found.items()},
        "minutes": round(seconds / 60, 2),
        "devices": f"{jax.local_device_count()} x {device.device_kind}",
        "jax": jax.__version__,
    }


def _tell(job: Job, log: RunLog, summary: dict[str, Any], say: Callable[[str], None]) -> None:
    before, after = log.evaluation(0), log.evaluation(job.config.steps)
    if before and after:
        for question, was, now in zip(job.questions[: job.config.show], before["answers"], after["answers"], strict=False):
            mark = {True: "right", False: "wrong"}
            said = [f"{question.choices[i].strip()} ({mark[i == question.label]})" for i in (was, now)]
            say(f"\n{question.prompt}\n    before: {said[0]}    after: {said[1]}")
        say(f"\nvalidation accuracy: {before['acc']:.1%} before, {after['acc']:.1%} after ({before['questions']} questions)")
    say(f"loss: {summary['loss_first_10']:.4f} (first 10 steps) -> {summary['loss_last_10']:.4f} (last 10 steps)")
    say(f"{job.config.steps} steps, {summary['minutes']} minutes; adapter in {job.directory / 'adapter'}, "
        f"pictures {job.directory / 'loss.png'} and {job.directory / 'norms.png'}, numbers in {job.directory / METRICS}")
