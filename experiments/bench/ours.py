"""Our side of ``bench.py train``: the library's own training step."""

from __future__ import annotations

import math
import os
import platform
import time
from functools import cache
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.side import Side, cores, host_memory, resident, serve
from bench.work import Workload, arrays
from stablelora_jax import InputError, LoraSpec, adapted, init_adapters
from stablelora_jax.config.optimizer import CONFIGS, FREEZES_A
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import Constant
from stablelora_jax.data import Batch
from stablelora_jax.data.batch import positions_of_mask
from stablelora_jax.lora.pairs import pairs
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.models.attention import require_here
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.parallel import Layout, pmap_layout
from stablelora_jax.quantization import is_linear, quantize
from stablelora_jax.runs.build import make_hyperparams, make_training
from stablelora_jax.training.remat_policy import choose_remat
from stablelora_jax.training.step import init_state, make_train_step
from stablelora_jax.utils.tree import keys_of


class StepSetup(NamedTuple):
    """The training step with its arguments."""

    step: Any  # of make_train_step
    state: Any
    params: Any
    batch: Any
    numbers: Any
    lora_parameters: int
    frozen_lora_parameters: int  # those of lora_parameters that have no gradient
    remat: str


def random_params(model: Decoder, layout: Layout, kind: str | None) -> Any:
    """Random parameters, initialised on device as in Hugging Face (normal, std 0.02); quantised if ``kind`` is given.

    Norm scales are 1, biases 0.
    """
    count = iter(range(10_000))

    def initialize(path: Any, leaf: Any) -> Any:
        keys, sharding = keys_of(path), layout.base_sharding(keys_of(path), leaf.shape)
        if keys[-1] in ("scale", "bias"):
            return jnp.full(leaf.shape, keys[-1] == "scale", leaf.dtype, device=sharding)
        seeds = jax.random.split(jax.random.key(next(count), impl="rbg"), math.prod(leaf.shape[:-2]))
        return _initializer(leaf.shape, leaf.dtype, kind if is_linear(keys) else None, sharding)(seeds)

    return jax.tree_util.tree_map_with_path(initialize, abstract_params(model))


@cache
def _initializer(shape: tuple[int, ...], dtype: Any, kind: str | None, sharding: Any) -> Any:
    """Compiled: random keys, one per matrix -> the parameter. One matrix at a time: random bits double the memory."""

    def make(seeds: jax.Array) -> Any:
        found = jax.lax.map(lambda key: 0.02 * jax.random.normal(key, shape[-2:], dtype), seeds).reshape(shape)
        return quantize(found, kind) if kind else found

    return jax.jit(make, out_shardings=sharding)


def batch_of(work: Workload) -> Batch:
    """The batch; where only some tokens have a loss, with their positions, as the data loader provides them."""
    found = arrays(work)
    mask = found["loss_mask"]
    return Batch(
        **found, loss_positions=None if work.loss_fraction == 1 else positions_of_mask(mask, int(mask.sum(1).max()))
    )


def local_devices(work: Workload) -> list[jax.Device]:
    """The devices of our side.

    A CPU is split into ``work.devices`` devices, by default into as many cores as divide the rows: XLA runs many CPU
    operations in a single thread, so one device per core runs them in parallel.

    Raises:
      InputError: there are fewer devices than ``work.devices``.
    """
    count = work.devices or math.gcd(work.batch // work.accumulate, cores())
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.local_devices()
    wanted = work.devices or (math.gcd(count, len(found)) if found[0].platform == "cpu" else 1)
    if len(found) < wanted:
        raise InputError(f"--devices {wanted}: only {len(found)} available")
    return found[:wanted]


def make_step(work: Workload, layout: Layout, params: Any = None) -> StepSetup:
    """The step of ``experiments/train.py`` with the same settings, without clipping; random parameters by default."""
    require_here(work.attention or "auto")
    options = {"dtype": jnp.dtype(work.dtype), "segments": work.documents}  # a run counts the segments in its data
    model = Decoder(decoder_config(work.config, work.shape), **options, attention=work.attention or "auto")
    params = random_params(model, layout, work.quantize) if params is None else layout.place_base(params)
    spec = LoraSpec(target_modules=work.target, rank=work.rank, alpha=2 * work.rank)
    adapters = init_adapters(jax.random.key(0), params, spec)
    rows = work.batch // (layout.parts * work.accumulate)
    sizes: dict[str, Any] = {"rows": rows, "length": work.length, "dtype": model.dtype, "attention": model.attention}
    model = model.clone(remat=work.remat or choose_remat(model.config, params, adapters, **sizes))
    run = RunConfig(lora=spec, optimizer=CONFIGS[work.optimizer](), schedule=Constant(), max_grad_norm=None)
    tx, trained = make_training(run, params, adapters)
    numbers = make_hyperparams(run, adapters)
    step = make_train_step(adapted(model, spec), tx, layout, trained=trained, accumulate=work.accumulate)
    state = layout.place_state(jax.tree.map(np.asarray, init_state(adapters, tx(numbers), jax.random.key(1))))
    lora = sum(x.size for x in jax.tree.leaves(adapters))
    frozen = sum(pair["lora_a"].size for pair in pairs(adapters).values()) if work.optimizer in FREEZES_A else 0
    batch = layout.split(batch_of(work))
    return StepSetup(step, state, params, batch, layout.place_base(numbers), lora, frozen, model.remat)


def prepare(work: Workload) -> Side:
    """Compile the step and warm up with two steps."""
    if "JAX_ENABLE_COMPILATION_CACHE" not in os.environ:  # by default compile_seconds must include the compilation
        jax.config.update("jax_enable_compilation_cache", False)
    devices = local_devices(work)
    device, before = devices[0], resident()
    made = make_step(work, pmap_layout(devices))
    state = made.state
    jax.block_until_ready((state, made.params))  # else the initialisation competes with the compiler for the cores
    began = time.perf_counter()
    compiled = made.step.lower(state, made.params, made.batch, made.numbers).compile()
    seconds = time.perf_counter() - began

    def run(count: int) -> float:
        nonlocal state
        for _ in range(count):
            state, metrics = compiled(state, made.params, made.batch, made.numbers)
        jax.block_until_ready((state, metrics))
        return float(metrics["loss"][0])

    run(2)
    metadata = {"compile_seconds": seconds, "device": device.device_kind, "platform": device.platform}
    metadata |= {"lora_parameters": made.lora_parameters, "frozen_lora_parameters": made.frozen_lora_parameters}
    metadata |= {"devices": len(devices), "versions": versions()}
    metadata |= {"remat": made.remat, "program_bytes": program_bytes(compiled)}
    return Side(run, metadata, host_memory(before) if device.platform == "cpu" else lambda: device_memory(device))


def program_bytes(compiled: Any) -> int | None:
    """Bytes per device of the compiled step: arguments, outputs, temporaries; None where XLA does not report them."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    buffers = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return buffers + found.temp_size_in_bytes


def device_memory(device: jax.Device) -> dict[str, Any]:
    """The peak of the first device's allocator since the process started, initialisation and compilation included."""
    return {"peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use")}


def versions() -> dict[str, str]:
    """The versions of our side's packages."""
    found = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    return {**found, "optax": optax.__version__}


if __name__ == "__main__":
    serve(prepare)
