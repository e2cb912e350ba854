"""The summary of a finished run: ``summary.json`` and the lines that are logged."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

import jax
import numpy as np

from stablelora_jax.config.run import RunConfig
from stablelora_jax.data.tasks.question import Question
from stablelora_jax.runs.log import RunLog
from stablelora_jax.runs.records import each_record, plain


def summarize(
    config: RunConfig,
    log: RunLog,
    steps: int,
    adapter_step: int,
    seconds: float,
    questions: Sequence[Question] = (),
) -> dict[str, Any]:
    """Losses, evaluations before and after (absent without evaluation), data, samples, minutes, devices and versions.

    ``steps`` is the number of steps done, below ``config.steps`` where the run stopped early; the adapter is that of
    step ``adapter_step``. Mean losses leave out steps whose loss is not finite; None where all are. All of it is JSON.
    """
    first, last = _first_and_last(record["loss"] for record in each_record(log.path) if "loss" in record)
    evaluations = log.history.evaluations
    found = {"before": evaluations.get(0), "after": evaluations.get(steps)}
    found |= {"kept": evaluations.get(adapter_step)} if config.select == "best" else {}
    summary = {
        "steps": steps,
        "stopped_early": steps < config.steps,
        "adapter_of_step": adapter_step,
        "data": log.history.data,
        "loss_first_10": _mean(first),
        "loss_last_10": _mean(last),
        **{name: {k: v for k, v in e.items() if k != "answers"} for name, e in found.items() if e},
        "minutes": round(seconds / 60, 2),
        "devices": f"{jax.device_count()} x {jax.local_devices()[0].device_kind}",
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "samples": sample_answers(config, log, questions, steps),
        "environment": environment(),
    }
    made: dict[str, Any] = plain(summary)
    return made


def summary_lines(
    config: RunConfig, log: RunLog, questions: Sequence[Question], summary: dict[str, Any]
) -> Iterator[str]:
    """A few questions with the answers before and after training, then the accuracies and the losses."""
    before, after = log.history.evaluations.get(0), log.history.evaluations.get(summary["steps"])
    if before and after and questions and all(_fits(found, questions) for found in (before, after)):
        for sample in sample_answers(config, log, questions, summary["steps"]):
            answers = (sample["before"], sample["after"])
            was, now = (f"{a} ({'right' if a == sample['right'] else 'wrong'})" for a in answers)
            yield f"\n{sample['prompt']}\n    before: {was:<28} after: {now}"
        accuracy = f"{before['acc']:.1%} before, {after['acc']:.1%} after"
        yield f"\nvalidation accuracy: {accuracy} ({before['questions']} questions)"
    if before and after and "loss" in before and "loss" in after:
        yield f"validation loss: {before['loss']:.4f} before, {after['loss']:.4f} after"
    if summary["stopped_early"]:
        yield f"stopped after {summary['steps']} of {config.steps} steps: {config.metric} no longer gets better"
    if config.select == "best":
        yield f"the adapter is that of step {summary['adapter_of_step']}, the best by {config.metric}"
    if summary["loss_first_10"] is not None and summary["loss_last_10"] is not None:
        yield f"loss: {summary['loss_first_10']:.4f} (first 10 steps) -> {summary['loss_last_10']:.4f} (last 10 steps)"


def sample_answers(config: RunConfig, log: RunLog, questions: Sequence[Question], steps: int) -> list[dict[str, str]]:
    """``prompt``, the ``right`` answer and those ``before`` and ``after`` training of ``config.num_samples`` questions.

    Empty where there are no questions, or no answers to them at step 0 and at step ``steps``.
    """
    before, after = log.history.evaluations.get(0), log.history.evaluations.get(steps)
    if not (before and after and questions and _fits(before, questions) and _fits(after, questions)):
        return []
    samples = []
    for i in np.linspace(0, len(questions) - 1, config.num_samples, dtype=int):
        question = questions[i]
        chosen = {"right": question.label, "before": before["answers"][i], "after": after["answers"][i]}
        samples.append({"prompt": question.prompt} | {k: question.choices[a].strip() for k, a in chosen.items()})
    return samples


def environment() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in ("stablelora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"platform": platform.platform()}


def _fits(evaluation: dict[str, Any], questions: Sequence[Question]) -> bool:
    """Whether the evaluation has an answer to each question; a user may have edited the log that it was read from."""
    answers = evaluation.get("answers", [])
    whole = "acc" in evaluation and "questions" in evaluation and len(answers) == len(questions)
    return whole and all(0 <= a < len(q.choices) for a, q in zip(answers, questions, strict=True))


def _first_and_last(losses: Iterable[float | None]) -> tuple[list[float | None], list[float | None]]:
    """The first ten and the last ten, which may overlap."""
    rest = iter(losses)
    first = list(islice(rest, 10))
    return first, list(deque([*first, *deque(rest, 10)], 10))


def _mean(losses: Sequence[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None]
    return float(np.mean(finite)) if finite else None
