"""Both paths of ``adapted`` on one model: ``python experiments/trace_cost.py [key=value ...]``.

A Llama of 15M parameters with random weights is trained by the path at Flax's own modules and by the path through the
computation (:mod:`stablelora_jax.lora.trace`), in turns. What is compared: seconds to trace and to compile a step,
FLOPs and temporary memory of the compiled step, seconds of a step; and the values of one step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench.optimizers import decoder, machine

from stablelora_jax import LoraSpec, adapted, config, init_adapters, stable_lora
from stablelora_jax.config import option
from stablelora_jax.lora.trace.apply import find_targets
from stablelora_jax.runs.cli import exit_code


@dataclass(frozen=True)
class TraceCostConfig:
    """The keys of the command line."""

    rounds: int = option(9, "blocks of steps for each path, in turns")
    block: int = option(3, "steps per block")
    compilations: int = option(3, "compilations of each path, in turns")
    rows: int = option(8, "rows per step")
    length: int = option(128, "tokens per row")
    rank: int = option(8, "LoRA rank, on all linear modules")


class Path:
    """A training step by one of the two paths."""

    def __init__(self, settings: TraceCostConfig, traced: bool) -> None:
        model, shapes = decoder("llama-15m")
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(lambda s: jnp.asarray(0.02 * rng.normal(size=s.shape), s.dtype), shapes)
        self.tokens = jnp.asarray(rng.integers(0, 32000, (settings.rows, settings.length)), jnp.int32)
        spec, self.tx = LoraSpec(target_modules="all-linear", rank=settings.rank), stable_lora(1e-4)
        self.lora = adapted(model, spec)
        if traced:
            self.lora.found.update(find_targets(self.lora, {"params": self.params}, (self.tokens,), {}))
        self.adapters = init_adapters(jax.random.key(0), self.params, spec)
        self.state = self.tx.init(self.adapters)

    def compile(self) -> tuple[float, float, Any]:
        """Seconds to trace and to compile, and the compiled step."""

        def step(adapters: Any, state: Any, params: Any, tokens: Any) -> Any:
            def loss(adapters: Any) -> Any:
                logits = self.lora.apply({"params": params, "lora": adapters}, tokens[:, :-1])
                return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

            value, grads = jax.value_and_grad(loss)(adapters)
            updates, state = self.tx.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state, value

        began = time.perf_counter()
        lowered = jax.jit(step).lower(self.adapters, self.state, self.params, self.tokens)
        traced = time.perf_counter()
        compiled = lowered.compile()
        return traced - began, time.perf_counter() - traced, compiled


def measure(settings: TraceCostConfig) -> dict[str, dict[str, Any]]:
    """For each path its numbers by name; ``step`` holds the seconds of each block, divided by its steps."""
    jax.config.update("jax_enable_compilation_cache", False)
    paths = {"modules": Path(settings, False), "computation": Path(settings, True)}
    found: dict[str, dict[str, Any]] = {name: {"trace": [], "compile": [], "step": []} for name in paths}
    for _ in range(settings.compilations):
        for name, path in paths.items():
            traced, compiled, step = path.compile()
            found[name]["trace"].append(traced)
            found[name]["compile"].append(compiled)
            found[name] |= {"compiled": step}
    for number in range(-1, settings.rounds):
        for name in list(paths) if number % 2 else list(paths)[::-1]:
            path, began = paths[name], time.perf_counter()
            for _ in range(settings.block):
                result = found[name]["compiled"](path.adapters, path.state, path.params, path.tokens)
            jax.block_until_ready(result)
            if number >= 0:
                found[name]["step"].append((time.perf_counter() - began) / settings.block)
            found[name]["loss"] = float(result[2])
    for numbers in found.values():
        step = numbers.pop("compiled")
        numbers["flops"], numbers["temporary"] = (
            step.cost_analysis()["flops"],
            step.memory_analysis().temp_size_in_bytes,
        )
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Both paths and their ratio, as Markdown."""
    rows = ["| | modules | computation | ratio |", "| --- | ---: | ---: | ---: |"]
    names = {"trace": "s to trace", "compile": "s to compile", "step": "s a step", "flops": "GFLOPs a step"}
    names |= {"temporary": "MiB of temporaries", "loss": "loss"}
    for key, title in names.items():
        scale = {"flops": 1e9, "temporary": 2**20}.get(key, 1.0)
        values = [numbers[key] for numbers in found.values()]
        one, two = (statistics.median(v) if isinstance(v, list) else v / scale for v in values)
        ratio = two / one
        if key == "step":
            ratio = statistics.median(b / a for a, b in zip(*values, strict=True))
        rows.append(f"| {title} | {one:.4g} | {two:.4g} | {ratio:.3f} |")
    return "\n".join(rows)


def main() -> int:
    """Parse the command line, measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="keys:\n\n" + config.help_text(TraceCostConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    settings = config.load(TraceCostConfig, None, parser.parse_args().overrides)
    return exit_code(lambda: print("\n".join([machine(), "", table(measure(settings))])))


if __name__ == "__main__":
    sys.exit(main())
