"""Compares this package's evaluation with EleutherAI's lm-evaluation-harness (``lm_eval``, PyTorch, float32).

``python experiments/compare_harness.py MODEL --data DIR [--tasks ...] [--limit N]`` needs ``lm_eval`` and ``torch``.
Both read the same local rows; the harness through the YAMLs of ``tests/evaluation/harness_tasks``. The exit code is 1
if in any row ``acc``, ``acc_norm``, the generated text, an extracted answer or ``exact_match`` differs, or if a mean or
a standard error does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_CACHE", str(Path(tempfile.gettempdir()) / "compare_harness"))
os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")

import yaml  # noqa: E402

from stablelora_jax import InputError  # noqa: E402
from stablelora_jax.runs.cli import exit_code  # noqa: E402

YAMLS = Path(__file__).parents[1] / "tests" / "evaluation" / "harness_tasks"
METRICS = ("acc", "acc_norm", "exact_match")
TASKS = ("arc_easy", "arc_challenge", "openbookqa", "social_i_qa", "hellaswag", "gsm8k")


def main() -> int:
    """Parse the command line, compare, and print one line per task; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face directory or GGUF file")
    add("--adapter", metavar="DIR", help="PEFT adapter, loaded on both sides (the harness needs peft)")
    add("--data", metavar="DIR", type=Path, required=True, help="directory with TASK/SPLIT.jsonl or .jsonl.gz")
    add("--tasks", metavar="NAMES", default=",".join(TASKS), help="task names, comma-separated (default: all)")
    add("--limit", metavar="N", type=int, default=200, help="rows per multiple-choice task (default 200)")
    add("--limit-gsm8k", metavar="N", type=int, default=20, help="rows of gsm8k (default 20)")
    add("--batch-size", metavar="B", type=int, default=16, help="batch size on both sides (default 16)")
    arguments = parser.parse_args()
    limits = {
        name: arguments.limit_gsm8k if name == "gsm8k" else arguments.limit for name in arguments.tasks.split(",")
    }
    given = (arguments.model, arguments.data, limits, arguments.batch_size, arguments.adapter)
    found: list[dict[str, Any]] = []
    failed = exit_code(lambda: found.extend(compare(*given)))
    return failed or int(any(line["different"] for line in found))


def compare(
    model: str, data: Path, limits: dict[str, int], batch_size: int = 16, adapter: str | None = None
) -> list[dict[str, Any]]:
    """Evaluate both sides on each task and compare them; prints one line per task.

    Args:
      model: Hugging Face directory or GGUF file.
      data: directory with ``TASK/SPLIT.jsonl`` or ``.jsonl.gz``.
      limits: number of rows by task.
      batch_size: on both sides.
      adapter: directory of a PEFT adapter.

    Returns:
      For each task ``task``, ``rows`` (their number), ``different`` (``(row, field, ours, harness)`` of all values that
      should be equal) and ``largest`` (the largest difference of two log-likelihoods).
    """
    import jax.numpy as jnp

    from stablelora_jax.evaluation.tasks import measure, subject
    from stablelora_jax.interop.load_adapted import load_adapted_model

    one = subject(*load_adapted_model(model, adapter, dtype=jnp.float32), batch_size=batch_size)
    lm = harness_model(model, adapter, batch_size)
    lines = []
    for name, limit in limits.items():
        ours = measure(one, name, data, limit=limit)
        rows, means = harness_rows(lm, name, data, limit)
        line = difference(name, ours, rows, means)
        lines.append(line)
        metrics = [key for key in ours.summary if key.split(",")[0] in METRICS and not key.endswith("_stderr")]
        values = ", ".join(f"{key} {ours.summary[key]:.4f}" for key in metrics)
        same = "identical" if not line["different"] else f"DIFFERENT: {line['different'][:3]}"
        note = f"; log-likelihoods differ by at most {line['largest']:.2e}" if name != "gsm8k" else ""
        print(f"{name}: {len(rows)} rows {same} ({values}){note}", flush=True)
    return lines


def harness_model(model: str, adapter: str | None, batch_size: int) -> Any:
    """The harness's ``HFLM`` in float32 on the CPU."""
    from lm_eval.models.huggingface import HFLM

    path = Path(model)
    source = {"pretrained": str(path.parent), "gguf_file": path.name} if path.is_file() else {"pretrained": model}
    return HFLM(**source, dtype="float32", device="cpu", batch_size=batch_size, peft=adapter)


def harness_rows(lm: Any, name: str, data: Path, limit: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The samples of ``lm_eval.simple_evaluate`` in the format of our rows, and its aggregated metrics.

    Raises:
      InputError: there is no file of rows.
    """
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    config = task_config(name, data)
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(lm, tasks=[config], limit=limit, bootstrap_iters=2, task_manager=manager)
    samples = sorted(results["samples"][config["task"]], key=lambda sample: sample["doc_id"])
    rows: list[dict[str, Any]] = [{"index": i} for i in sorted({sample["doc_id"] for sample in samples})]
    for sample in samples:
        row, responses = rows[sample["doc_id"]], sample["filtered_resps"]
        if name == "gsm8k":
            row["generated"] = sample["resps"][0][0]
            row.setdefault("extracted", {})[sample["filter"]] = responses[0]
            row.setdefault("exact_match", {})[sample["filter"]] = float(sample["exact_match"])
        else:
            row["loglikelihoods"], row["target"] = [float(value) for value, _ in responses], int(sample["target"])
            row |= {metric: float(sample[metric]) for metric in ("acc", "acc_norm") if metric in sample}
    return rows, results["results"][config["task"]]


def task_config(name: str, data: Path) -> dict[str, Any]:
    """The harness's task config of ``tests/evaluation/harness_tasks``, with the local file of rows.

    Raises:
      InputError: there is no file of rows.
    """
    split = "test" if name == "gsm8k" else "validation"
    file = next((f for f in (data / name / f"{split}.jsonl", data / name / f"{split}.jsonl.gz") if f.is_file()), None)
    if file is None:
        raise InputError(f"{data / name} has no {split}.jsonl or {split}.jsonl.gz")
    config = yaml.safe_load((YAMLS / f"{name}.yaml").read_text())
    config["dataset_kwargs"] = {"data_files": {"rows": str(file.resolve())}}
    if name == "hellaswag":
        from lm_eval.tasks.hellaswag.utils import preprocess

        config["process_docs"] = lambda rows: rows.map(
            lambda row: {
                "query": preprocess(row["activity_label"] + ": " + row["context"]),
                "choices": [preprocess(choice) for choice in row["choices"]],
            }
        )
    return config


def difference(name: str, ours: Any, theirs: list[dict[str, Any]], means: dict[str, float]) -> dict[str, Any]:
    """Compare our rows and summary with those of the harness; returns an entry of :func:`compare`'s result."""
    different: list[Any] = [] if len(ours.rows) == len(theirs) else [("rows", len(ours.rows), len(theirs))]
    largest = 0.0
    for a, b in zip(ours.rows, theirs, strict=False):
        different += [
            (a["index"], key, a.get(key), b[key]) for key in b if key != "loglikelihoods" and a.get(key) != b[key]
        ]
        pairs = zip(a.get("loglikelihoods", []), b.get("loglikelihoods", []), strict=True)
        largest = max([largest, *(abs(x - y) for x, y in pairs)])
    for key, value in ours.summary.items():
        metric, _, rest = key.partition(",")
        stderr = key.endswith("_stderr")
        metric, rest = metric.removesuffix("_stderr"), rest.removesuffix("_stderr") or "none"
        if metric in METRICS:
            other = means[f"{metric}_stderr,{rest}" if stderr else f"{metric},{rest}"]
            if value is not None and abs(value - other) > 1e-12:
                different.append((key, value, other))
    return {"task": name, "rows": len(theirs), "different": different, "largest": largest}


if __name__ == "__main__":
    sys.exit(main())
