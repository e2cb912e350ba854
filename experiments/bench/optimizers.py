"""``bench.py optimizers [key=value ...]``: the cost of an optimizer update.

For the adapters of Qwen2-0.5B: the time of an update (``tx.update`` and ``optax.apply_updates`` as one jitted program)
of every optimizer, interleaved with AdamW's; its compile time; the bytes of its state. Then, for a Llama of 15M
parameters: the difference to AdamW's update as a share of the training step.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from bench.shapes import SHAPES
from stablelora_jax import InputError, LoraSpec, adapted, config, init_adapters, optimizers
from stablelora_jax.config import option
from stablelora_jax.config.optimizer import CONFIGS, OPTIMIZERS
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.utils.outputs import open_output

ADAPTERS = {
    "q_proj, v_proj, r=8": LoraSpec(target_modules=["q_proj", "v_proj"], rank=8),
    "all-linear, r=16": LoraSpec(target_modules="all-linear", rank=16),
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in OPTIMIZERS if name != "adamw"} | {
    "stable_lora, all latches off": ("stable_lora", {}),  # no pair shrinks any more
    "lora_rite, code": ("lora_rite", {"variant": "code"}),
    "lora_pro, full": ("lora_pro", {"form": "full"}),
    "lora_fa, peft": ("lora_fa", {"variant": "peft"}),
}
FULL = "lora_pro, full"  # keeps moments of whole kernels (gigabytes): measured for the smaller set of adapters only


@dataclass(frozen=True)
class BenchConfig:
    """The keys of ``bench.py optimizers``."""

    repeats: int = option(50, "timed updates of each optimizer, interleaved with as many of AdamW")
    step_repeats: int = option(200, "the same, for the share of a training step")
    steps: int = option(5, "timed training steps")
    rows: int = option(8, "rows per training step")
    length: int = option(256, "tokens per row")
    only: tuple[str, ...] = option((), "optimizers to measure; [] for all")
    output: str | None = option(None, "Markdown file to write in addition to printing")

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("repeats", "step_repeats", "steps", "rows", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.output and not Path(self.output).parent.is_dir():
            raise InputError(f"output: directory {Path(self.output).parent} does not exist: create it first")
        for name in self.only:
            if name not in ROWS:
                raise InputError(f"only: {name!r} is not one of {', '.join(ROWS)}")


class Program(NamedTuple):
    """A compiled update with its arguments."""

    call: Callable[..., Any]
    arguments: tuple[Any, Any, Any]  # gradients, state, adapters
    compile_seconds: float
    state_bytes: int


def decoder(name: str) -> tuple[Decoder, Any]:
    """The model of a shape in ``bench.shapes``, and the shapes of its parameters."""
    model = Decoder(decoder_config(SHAPES[name], name))
    return model, abstract_params(model)


def trained_adapters(params: Any, spec: LoraSpec, shrinking: bool = True) -> Any:
    """Adapters as in mid-training: B is small, or with ``shrinking=False`` so large that no pair shrinks any more."""
    adapters = init_adapters(jax.random.key(0), params, spec)
    rng = np.random.default_rng(0)
    size = 1e-3 if shrinking else 1e3

    def fill(path: Any, x: jax.Array) -> jax.Array:
        return x if "lora_a" in str(path[-1]) else jnp.asarray(size * rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(fill, adapters)


def transformation(row: str, adapters: Any, spec: LoraSpec) -> optax.GradientTransformation:
    """The optimizer of a row, with the LoRA scales if it takes them."""
    name, options = ROWS.get(row, (row, {}))
    if "scale" in OPTIMIZERS[name].__code__.co_varnames:
        options = {**options, "scale": optimizers.scales(adapters, spec)}
    return OPTIMIZERS[name](CONFIGS[name]().learning_rate, **options)


def prepare(row: str, params: Any, spec: LoraSpec) -> Program:
    """Compile the update of one row."""
    adapters = trained_adapters(params, spec, shrinking="latches off" not in row)
    tx = transformation(row, adapters, spec)
    state = jax.jit(tx.init)(adapters)
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: jnp.asarray(1e-3 * rng.normal(size=x.shape), x.dtype), adapters)

    def step(grads: Any, state: Any, adapters: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    began = time.perf_counter()
    call = jax.jit(step).lower(grads, state, adapters).compile()
    seconds = time.perf_counter() - began
    adapters, state = jax.block_until_ready(call(grads, state, adapters))  # pairs with a large B stop shrinking here
    return Program(call, (grads, state, adapters), seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))


def clock(program: Program) -> float:
    """The seconds of one call."""
    began = time.perf_counter()
    jax.block_until_ready(program.call(*program.arguments))
    return time.perf_counter() - began


def interleaved(program: Program, baseline: Program, repeats: int) -> tuple[float, float]:
    """The median seconds of both programs, called alternately."""
    for _ in range(2):
        clock(program), clock(baseline)
    times = [(clock(program), clock(baseline)) for _ in range(repeats)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def step_seconds(settings: BenchConfig, spec: LoraSpec) -> tuple[float, Any]:
    """The median seconds of a training step with AdamW of the 15M Llama, and the shapes of its parameters."""
    model, shapes = decoder("llama-15m")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.02 * rng.normal(size=s.shape), s.dtype), shapes)
    adapters, lora, tx = init_adapters(jax.random.key(0), params, spec), adapted(model, spec), optax.adamw(1e-4)
    size = (settings.rows, settings.length + 1)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, size), jnp.int32)

    def step(adapters: Any, state: Any, params: Any, tokens: Any) -> tuple[Any, Any]:
        def loss(adapters: Any) -> jax.Array:
            logits = lora.apply({"params": params, "lora": adapters}, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    call, state = jax.jit(step), tx.init(adapters)
    program = Program(call, (adapters, state, params, tokens), 0.0, 0)  # type: ignore[arg-type]
    clock(program)
    return statistics.median(clock(program) for _ in range(settings.steps)), shapes


def measure(settings: BenchConfig) -> list[str]:
    """The tables as lines of Markdown."""
    rows = [row for row in ROWS if not settings.only or row in settings.only]
    bar = tqdm(total=3 * len(rows), disable=not sys.stderr.isatty(), desc="bench", unit="optimizer")
    _, qwen = decoder("qwen2-0.5b")
    lines = []
    for title, spec in ADAPTERS.items():
        lines += [f"### Qwen2-0.5B, {title}", "", *update_table(rows, qwen, spec, settings.repeats, bar), ""]
    lines += [*step_table(rows, settings, bar)]
    bar.close()
    return lines


def update_table(rows: list[str], params: Any, spec: LoraSpec, repeats: int, bar: tqdm) -> Iterator[str]:
    """The time, state and compile time of an update of each row, and the ratio of its time to AdamW's."""
    base = prepare("adamw", params, spec)
    yield "| optimizer | update, ms | / AdamW | state, MB | compile, s |"
    yield "| --- | --- | --- | --- | --- |"
    adamw, _ = interleaved(base, base, repeats)
    yield f"| adamw | {1e3 * adamw:.2f} | 1.00 | {base.state_bytes / 1e6:.3f} | {base.compile_seconds:.2f} |"
    for row in rows:
        bar.update()
        if row == FULL and spec.target_modules == "all-linear":
            continue
        program = prepare(row, params, spec)
        own, adamw = interleaved(program, base, repeats)
        size, seconds = f"{program.state_bytes / 1e6:.3f}", f"{program.compile_seconds:.2f}"
        yield f"| {row} | {1e3 * own:.2f} | {own / adamw:.2f} | {size} | {seconds} |"


def step_table(rows: list[str], settings: BenchConfig, bar: tqdm) -> Iterator[str]:
    """The difference of each row's update to AdamW's, as a share of a training step of the 15M Llama."""
    spec = LoraSpec(target_modules="all-linear", rank=8)
    step, llama = step_seconds(settings, spec)
    base = prepare("adamw", llama, spec)
    yield f"### Share of a training step: Llama-15M, all-linear, r=8, {settings.rows} x {settings.length} tokens"
    yield from ("", f"One step with AdamW: {1e3 * step:.1f} ms.", "")
    yield "| optimizer | update, ms | AdamW, ms | difference / step | state bytes minus AdamW's |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        bar.update()
        program = prepare(row, llama, spec)
        own, adamw = interleaved(program, base, settings.step_repeats)
        more = program.state_bytes - base.state_bytes
        yield f"| {row} | {1e3 * own:.3f} | {1e3 * adamw:.3f} | {100 * (own - adamw) / step:+.2f} % | {more:+d} |"


def machine() -> str:
    """The date, the device and the package versions, in one line."""
    device = jax.devices()[0]
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}"
    return (
        f"{datetime.date.today()}, {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores, "
        f"{versions}, optax {optax.__version__}"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The ``key=value`` arguments."""
    parser.epilog, parser.formatter_class = (
        "keys:\n\n" + config.help_text(BenchConfig),
        argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def bench(given: argparse.Namespace) -> None:
    """Measure, print the tables, and write them to ``output`` if given."""
    settings = config.load(BenchConfig, None, given.overrides)
    command = " ".join(["python experiments/bench.py optimizers", *given.overrides])
    with open_output(settings.output, "output") if settings.output else nullcontext() as output:
        text = "\n".join([machine(), "", f"    {command}", "", *measure(settings)]) + "\n"
        print(text)
        if output:
            output.write(text)
