"""Evaluate tasks by name: a row for each question, mean and standard error of each metric, result files and a table.

Definitions are lm-evaluation-harness's; a standard error is that of a mean, with ``n - 1`` (``mean_stderr``), absent
for one row and for perplexities. A perplexity beyond float64 is None.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablelora_jax.data.tasks import arc, gsm8k, hellaswag, merged_qa, openbookqa, social_i_qa, text
from stablelora_jax.data.tasks.question import Problem, Question
from stablelora_jax.evaluation.generate_until import generate_until
from stablelora_jax.evaluation.loglikelihood import (
    LoglikelihoodFn,
    Rows,
    encode,
    likelihoods,
    make_compute,
    prefix_token,
    rolling,
)
from stablelora_jax.evaluation.multiple_choice import choice_scores, correct
from stablelora_jax.generation.decode import decoder_of
from stablelora_jax.parallel import pmap_layout
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import write_whole
from stablelora_jax.utils.outputs import new_directory

CHOICES = {
    "hellaswag": hellaswag.METRICS,
    "social_i_qa": social_i_qa.METRICS,
    "openbookqa": openbookqa.METRICS,
    "arc_easy": arc.METRICS,
    "arc_challenge": arc.METRICS,
    "merged_qa": merged_qa.METRICS,
}
TASKS = (*CHOICES, "gsm8k", "text")
MOST_ROWS = 2**16  # of a batch, which is computed whole even for fewer texts
SPLITS = {"gsm8k": "test"}  # the others: validation

Metrics = dict[str, float | None]


class TaskResult(NamedTuple):
    """The result of one task."""

    rows: list[dict[str, Any]]  # with "index", from 0, and keys of the task's kind
    summary: dict[str, Any]  # "split", "rows", and of each metric its value and "METRIC_stderr"


class EvalModel(NamedTuple):
    """A model to evaluate."""

    model: Any  # a Decoder with a tokenizer, or an adapted one
    variables: Mapping[str, Any]
    compute: LoglikelihoodFn
    batch_size: int
    progress: bool


@checked
def subject(model: Any, variables: Mapping[str, Any], *, batch_size: int = 16, progress: bool = False) -> EvalModel:
    """Prepare a model for :func:`measure`.

    Args:
      model: a ``Decoder`` or an adapted one.
      variables: ``{"params": ...}``, with ``"lora"`` for an adapted model.
      batch_size: texts that run together; rounded up to a multiple of the devices.
      progress: show the progress on stderr.

    Raises:
      InputError: the model has no tokenizer, the variables no parameters, or the batch is not positive or absurd; when
        measuring, numbers that are not finite.
    """
    if "params" not in variables:
        raise InputError('variables must hold "params", the parameters of the model')
    if decoder_of(model).tokenizer is None:
        raise InputError("the model has no tokenizer, and all tasks are text")
    if batch_size < 1:
        raise InputError(f"batch_size must be positive, not {batch_size}")
    if batch_size > MOST_ROWS:
        raise InputError(f"batch_size must be at most {MOST_ROWS}, not {batch_size}")
    layout = pmap_layout()
    inner, placed = make_compute(model, layout), layout.place_base(variables["params"])
    others = layout.place_state({name: own for name, own in variables.items() if name != "params"})
    n = layout.parts

    def compute(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        total, greedy = inner(placed, others, rows)
        if not np.isfinite(total).all():
            raise InputError("the model gives no finite numbers: its parameters or adapters hold NaN or infinity")
        return total, greedy

    return EvalModel(model, variables, compute, -(-batch_size // n) * n, progress)


@checked
def measure(
    subject: EvalModel,
    task: str,
    data: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
) -> TaskResult:
    """Measure one of :data:`TASKS`.

    Args:
      subject: from :func:`subject`.
      task: its name.
      data: directory that holds ``TASK/SPLIT.jsonl`` (or ``.jsonl.gz``); None for the hub.
      split: ``test`` for ``gsm8k`` and ``validation`` for the others unless given.
      limit: only the first rows.
      max_new_tokens: most tokens of a generated answer; the harness's default for ``gsm8k`` is 256.

    Raises:
      InputError: no such task or split, damaged rows, or texts that do not fit the model.
    """
    if task not in TASKS:
        raise InputError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be positive, not {limit}")
    split = split or SPLITS.get(task, "validation")
    path = None if data is None else str(data) if task == "merged_qa" else str(Path(data) / task)
    if task == "gsm8k":
        rows, metrics = _generated(subject, gsm8k.problems(split, path)[:limit], max_new_tokens)
    elif task == "text":
        rows, metrics = _texts(subject, text.texts(split, path)[:limit])
    else:
        load: Callable[..., list[Question]] = merged_qa.questions
        found = load(split, path) if task == "merged_qa" else merged_qa.part_questions(task, split, path)
        rows, metrics = choice_results(subject, found[:limit], CHOICES[task])
    return TaskResult(rows, {"split": split, "rows": len(rows), **metrics})


def write(output: Path, measured: Mapping[str, TaskResult], about: Mapping[str, Any]) -> None:
    """Write ``output/summary.json`` and ``output/TASK.jsonl``, all or nothing; ``output`` must not exist.

    Raises:
      InputError: it exists, or cannot be written.
    """
    with new_directory(output) as partial:
        try:
            for task, one in measured.items():
                write_whole(partial / f"{task}.jsonl", "".join(json.dumps(row) + "\n" for row in one.rows))
            summary = {**about, "tasks": {task: one.summary for task, one in measured.items()}}
            write_whole(partial / "summary.json", json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {output}: {error.strerror or error}") from None


def table(measured: Mapping[str, TaskResult]) -> str:
    """The summaries as lines of text."""
    lines = [("task", "split", "rows", "metric", "value", "stderr")]
    for task, (_, summary) in measured.items():
        for name, value in summary.items():
            if name in ("split", "rows") or name.endswith("_stderr"):
                continue
            stderr = summary.get(f"{name}_stderr")
            lines.append(
                (
                    task,
                    summary["split"],
                    str(summary["rows"]),
                    name,
                    f"{value:.4f}" if value is not None else "-",
                    f"{stderr:.4f}" if stderr is not None else "-",
                )
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def mean_stderr(values: Sequence[float]) -> float | None:
    """The standard error of the mean of ``values``; None for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _means(values: Mapping[str, Sequence[float]]) -> Metrics:
    metrics: Metrics = {}
    for name, own in values.items():
        metrics |= {name: float(np.mean(own)), f"{name}_stderr": mean_stderr(own)}
    return metrics


def _exp(value: float) -> float | None:
    """``exp(value)``; None beyond float64, as of a text without white space, which is one long word."""
    return math.exp(value) if value < math.log(sys.float_info.max) else None


def choice_results(
    subject: EvalModel, questions: Sequence[Question], metrics: Sequence[str]
) -> tuple[list[Any], Metrics]:
    """Rows with ``loglikelihoods``, ``target`` and the metrics, of ``acc`` and ``acc_norm`` those asked for; means."""
    decoder = decoder_of(subject.model)
    scores = choice_scores(
        subject.compute,
        decoder.tokenizer,
        questions,
        max_length=decoder.config.max_position_embeddings,
        rows=subject.batch_size,
        progress=subject.progress,
    )
    values = {name: own for name, own in correct(scores, questions).items() if name in metrics}
    rows = [
        {"index": i, "id": q.id, "loglikelihoods": scores[i].tolist(), "target": q.label}
        | {name: own[i] for name, own in values.items()}
        for i, q in enumerate(questions)
    ]
    return rows, _means(values)


def _generated(subject: EvalModel, problems: Sequence[Problem], longest: int) -> tuple[list[Any], Metrics]:
    texts = generate_until(
        subject.model,
        subject.variables,
        [problem.prompt for problem in problems],
        gsm8k.STOPS,
        max_new_tokens=longest,
        batch_size=subject.batch_size,
        progress=subject.progress,
    )
    rows: list[dict[str, Any]] = []
    for i, (problem, said) in enumerate(zip(problems, texts, strict=True)):
        found = gsm8k.extracted(said)
        match = {name: gsm8k.exact_match(answer, str(problem.target)) for name, answer in found.items()}
        own = {"generated": said, "extracted": found, "target": problem.target, "exact_match": match}
        rows.append({"index": i, "id": problem.id, **own})
    return rows, _means({f"exact_match,{name}": [row["exact_match"][name] for row in rows] for name in gsm8k.FILTERS})


def _texts(subject: EvalModel, texts: Sequence[str]) -> tuple[list[Any], Metrics]:
    decoder = decoder_of(subject.model)
    tokenizer, longest = decoder.tokenizer, decoder.config.max_position_embeddings
    windows = [rolling(encode(tokenizer, own), prefix_token(tokenizer), longest) for own in texts]
    flat = [request for own in windows for request in own]
    answers = iter(
        likelihoods(subject.compute, flat, rows=subject.batch_size, max_length=longest, progress=subject.progress)
    )
    rows = [
        {
            "index": i,
            "loglikelihood": sum(next(answers).total for _ in own),
            "tokens": sum(len(request.continuation) for request in own),
            "words": len(re.split(r"\s+", said)),
            "bytes": len(said.encode("utf-8")),
        }
        for i, (own, said) in enumerate(zip(windows, texts, strict=True))
    ]
    total = sum(row["loglikelihood"] for row in rows)
    per = {unit: -total / sum(row[f"{unit}s"] for row in rows) for unit in ("word", "byte", "token")}
    metrics: Metrics = {f"{unit}_perplexity": _exp(value) for unit, value in per.items()}
    return rows, metrics | {"bits_per_byte": per["byte"] / math.log(2)}
