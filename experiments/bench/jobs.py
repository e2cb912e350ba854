"""``bench.py jobs``: several small jobs side by side in one step, beside the same jobs one after another.

For each number of jobs K, three programs take turns: the step of K jobs, each with B rows; the step of one job with B
rows, which K runs one after another make; and the step of one job with K B rows, the ceiling. Reported are tokens per
second of the median round, and the memory that XLA reserves for the program, with its arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.ours import local_devices, make_step, program_bytes, random_params, versions
from bench.shapes import SHAPES
from bench.work import Workload, arrays
from stablelora_jax import LoraSpec, adapted, init_adapters
from stablelora_jax.config.optimizer import CONFIGS
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import Constant
from stablelora_jax.data import Batch
from stablelora_jax.data.batch import positions_of_mask
from stablelora_jax.jobs.kinds import Kind, leaf_shapes
from stablelora_jax.jobs.step import Rows, init_states, make_jobs_step
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.parallel import Layout, pmap_layout
from stablelora_jax.runs.build import make_hyperparams, make_training
from stablelora_jax.training.remat_policy import choose_remat
from stablelora_jax.training.step import init_state
from stablelora_jax.utils.errors import InputError

Run = Callable[[int], None]  # makes so many steps and waits for them


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench.py jobs``."""
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-15m", help="model architecture; weights are random")
    add("--batch", type=int, default=1, metavar="B", help="rows per step of each job (default 1)")
    add("--length", type=int, default=32, metavar="T", help="tokens per row (default 32)")
    add("--rank", type=int, default=8, metavar="R", help="LoRA rank (default 8)")
    add("--jobs", default="1,2,4,8,16", metavar="K,...", help="numbers of jobs (default 1,2,4,8,16)")
    add("--optimizer", choices=sorted(CONFIGS), default="adamw", help="optimizer of all jobs (default adamw)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the base and of the matmuls")
    add("--seconds", type=float, default=2.0, metavar="S", help="length of a round (default 2)")
    add("--rounds", type=int, default=5, metavar="N", help="rounds of each program, interleaved (default 5)")
    add("--json", action="store_true", help="print one line of JSON for each number of jobs")


def workload(given: argparse.Namespace, batch: int) -> Workload:
    """One job with ``batch`` rows."""
    fixed: dict[str, Any] = {"documents": 1, "target": "all-linear", "loss_fraction": 1.0, "accumulate": 1}
    fixed |= {"remat": None, "attention": None, "quantize": None, "devices": None}
    own = {key: getattr(given, key) for key in ("shape", "length", "rank", "dtype", "optimizer")}
    return Workload(**{**fixed, **own}, batch=batch, config=dict(SHAPES[given.shape]))


def alone(work: Workload, layout: Layout, params: Any) -> tuple[Run, int | None]:
    """The step of one job, and the bytes of its program."""
    made = make_step(work, layout, params)
    compiled = made.step.lower(made.state, made.params, made.batch, made.numbers).compile()
    state = made.state

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = compiled(state, made.params, made.batch, made.numbers)
        jax.block_until_ready(state)

    return run, program_bytes(compiled)


def together(work: Workload, count: int, layout: Layout, params: Any) -> tuple[Run, int | None]:
    """The step of ``count`` jobs of ``work`` each, and the bytes of its program."""
    params = layout.place_base(params)
    spec = LoraSpec(target_modules=work.target, rank=work.rank, alpha=2 * work.rank)
    adapters = init_adapters(jax.random.key(0), params, spec)
    model = Decoder(decoder_config(work.config, work.shape), dtype=jnp.dtype(work.dtype))
    sizes: dict[str, Any] = {"rows": work.batch * count // layout.parts, "length": work.length, "dtype": model.dtype}
    model = model.clone(remat=choose_remat(model.config, params, adapters, **sizes, attention=model.attention))
    config = RunConfig(lora=spec, optimizer=CONFIGS[work.optimizer](), schedule=Constant(), max_grad_norm=None)
    tx, trained = make_training(config, params, adapters)
    numbers = make_hyperparams(config, adapters)
    start = jax.tree.map(np.asarray, init_state(adapters, tx(numbers), jax.random.key(1)))
    kinds = [Kind(tuple(range(count)), count, tx, trained)]
    step, _ = make_jobs_step(adapted(model, spec), kinds, leaf_shapes([start.adapters]), layout, dropout=False)
    state = layout.place_state(init_states([start], kinds))
    hyperparams = layout.place_base((jax.tree.map(lambda x: np.stack([np.asarray(x)] * count), numbers),))
    one = arrays(replace(work, batch=work.batch * count))
    at = positions_of_mask(one["loss_mask"], int(one["loss_mask"].sum(1).max()))
    job = np.repeat(np.arange(count, dtype=np.int32), work.batch)
    number = np.tile(np.arange(work.batch, dtype=np.int32), count)
    weight = np.full(len(job), 1 / (work.batch * (work.length - 1)), np.float32)
    rows = layout.split(Rows(Batch(**one, loss_positions=at), job, number, weight))
    given = (None, params, rows, hyperparams, layout.place_base((np.ones(count, bool),)))
    compiled = step.lower(state, *given).compile()  # type: ignore[attr-defined]

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = compiled(state, *given)
        jax.block_until_ready(state)

    return run, program_bytes(compiled)


def rates(runs: dict[str, tuple[Run, int]], seconds: float, rounds: int) -> dict[str, float]:
    """Tokens per second of the median round; ``runs`` are ``(run, tokens of a step)``."""
    steps = {}
    for name, (run, _) in runs.items():
        run(2)
        began = time.perf_counter()
        run(2)
        steps[name] = max(1, round(2 * seconds / (time.perf_counter() - began)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, tokens) in runs.items():
            began = time.perf_counter()
            run(steps[name])
            found[name].append(steps[name] * tokens / (time.perf_counter() - began))
    return {name: statistics.median(own) for name, own in found.items()}


def measure(given: argparse.Namespace, count: int, every: Sequence[jax.Device]) -> dict[str, Any]:
    """The three programs for ``count`` jobs, on as many of the devices ``every`` as divide their rows."""
    small, large = workload(given, given.batch), workload(given, given.batch * count)
    one, all_of, few = (pmap_layout(every[: math.gcd(rows, len(every))]) for rows in (1, large.batch, small.batch))
    model = Decoder(decoder_config(small.config, small.shape), dtype=jnp.dtype(small.dtype))
    params = jax.tree.map(np.asarray, random_params(model, one, None))
    programs = {
        "side by side": (together(small, count, all_of, params), small.batch * count * small.length),
        "one after another": (alone(small, few, params), small.batch * small.length),
        "one job of all rows": (alone(large, all_of, params), large.batch * large.length),
    }
    speeds = rates({name: (run, tokens) for name, ((run, _), tokens) in programs.items()}, given.seconds, given.rounds)
    sizes = {name: size for name, ((_, size), _) in programs.items()}
    return {"jobs": count, "devices": all_of.parts, "tokens_per_second": speeds, "program_bytes": sizes}


def bench(given: argparse.Namespace) -> None:
    """Measure and print a table, or lines of JSON."""
    try:
        counts = [int(count) for count in given.jobs.split(",")]
    except ValueError:
        raise InputError(f"--jobs {given.jobs} must be numbers, such as 1,2,4") from None
    if min(counts) < 1 or min(given.batch, given.length - 1, given.rank, given.rounds) < 1 or given.seconds <= 0:
        raise InputError("--jobs, --batch, --rank, --rounds and --seconds must be positive, --length at least 2")
    jax.config.update("jax_enable_compilation_cache", False)
    devices = local_devices(workload(given, given.batch * max(counts)))
    title = f"{given.shape}, jobs of {given.batch} x {given.length} tokens, r={given.rank}, {given.optimizer}"
    if not given.json:
        print(f"{title}, {given.dtype}; {versions()}\n")
        print("| jobs | side by side, tokens/s | one after another | gain | one job of all rows | share | memory |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for count in counts:
        found = measure(given, count, devices)
        side, after, ceiling = found["tokens_per_second"].values()
        memory = found["program_bytes"]["side by side"] / found["program_bytes"]["one job of all rows"]
        line = f"| {count} | {side:.0f} | {after:.0f} | {side / after:.2f} | {ceiling:.0f} | {side / ceiling:.0%} "
        print(json.dumps({"title": title, **found}) if given.json else f"{line}| {memory:.2f} |", flush=True)
