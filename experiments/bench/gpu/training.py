"""Throughput of one side of ``bench.py train``, alone on the GPU, in this process."""

from __future__ import annotations

import math
import time
from typing import Any

from bench.shapes import SHAPES
from bench.work import Workload


def work_of(toy: bool = False, **arguments: Any) -> Workload:
    """The workload of a row; with ``toy``, of a tiny model."""
    config = dict(SHAPES[arguments["shape"]])
    config |= toy_sizes(config) if toy else {}
    given = {"target": ["q_proj", "down_proj"] if toy else "all-linear", "loss_fraction": 1.0, **arguments}
    return Workload(
        config=config, **{key: value for key, value in given.items() if key in Workload.__dataclass_fields__}
    )


def toy_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``config.json`` that make an architecture tiny."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"tie_word_embeddings": True}
    return {key: value for key, value in sizes.items() if key in config or key != "head_dim"}


def train(*, side: str, steps: int, rounds: int, toy: bool = False, **arguments: Any) -> dict[str, Any]:
    """Run one side; returns its metadata, ``round_seconds`` (seconds per step in each round), loss and memory."""
    work = work_of(toy, **arguments)
    ready = prepare_side(side, work, toy)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        loss = ready.run(steps)
        times.append((time.perf_counter() - began) / steps)
    return {**ready.metadata, "round_seconds": times, "loss": loss, **ready.memory()}


def prepare_side(side: str, work: Workload, toy: bool) -> Any:
    """The side after its warm-up."""
    if side == "ours":
        from bench.ours import prepare

        return prepare(work)
    if side == "tunix":
        from bench.tunix import prepare

        return prepare(work)
    from bench.peft import prepare

    backend = "aot_eager" if toy else "inductor"  # on a CPU Inductor compiles C++, which takes minutes
    return prepare(work, backend if side == "peft compile" else None)


def summary(found: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, MFU and quartiles, from the result of :func:`train`."""
    from bench.report import summary as of_side
    from stablelora_jax.training.flops import peak_flops

    given = {key: value for key, value in arguments.items() if key not in ("side", "steps", "rounds")}
    work = work_of(**given)
    peak = peak_flops(found["device"]) if work.dtype == "bfloat16" else None
    more = {key: found[key] for key in ("loss", "program_bytes", "remat") if key in found}
    return {**of_side(found, work, peak), **more, "ok": math.isfinite(found["loss"])}
