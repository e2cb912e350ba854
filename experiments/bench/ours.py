"""Our side of ``bench.py train``: the library's own training step, on one device."""

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
from bench.work import Work, arrays
from stablelora_jax import InputError, LoraSpec, adapted, init_adapters
from stablelora_jax.config.optimizer import CONFIGS, FREEZES_A
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import Constant
from stablelora_jax.data import Batch
from stablelora_jax.data.batch import loss_positions
from stablelora_jax.lora.pairs import pairs
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.models.attention import require_here
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.parallel import Layout, pmap_layout
from stablelora_jax.quantization import is_linear, quantize
from stablelora_jax.runs.build import make_training, numbers_of
from stablelora_jax.training.remat_policy import choose_remat
from stablelora_jax.training.step import init_state, make_train_step
from stablelora_jax.utils.tree import keys_of


class Ready(NamedTuple):
    """The training step and what it takes."""

    step: Any  # make_train_step's
    state: Any
    params: Any
    batch: Any
    numbers: Any
    lora: int  # numbers in the adapters
    held: int  # those that have no gradient
    remat: str


def drawn(model: Decoder, layout: Layout, kind: str | None) -> Any:
    """Parameters as Hugging Face initialises them (normal, 0.02), drawn where they lie; quantised as ``kind``."""
    count = iter(range(10_000))

    def draw(path: Any, leaf: Any) -> Any:
        keys, lie = keys_of(path), layout.base(keys_of(path), leaf.shape)
        if keys[-1] in ("scale", "bias"):
            return jnp.full(leaf.shape, keys[-1] == "scale", leaf.dtype, device=lie)
        seeds = jax.random.split(jax.random.key(next(count), impl="rbg"), math.prod(leaf.shape[:-2]))
        return _drawer(leaf.shape, leaf.dtype, kind if is_linear(keys) else None, lie)(seeds)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


@cache
def _drawer(shape: tuple[int, ...], dtype: Any, kind: str | None, lie: Any) -> Any:
    """Random keys, one a matrix, to a parameter: a matrix at a time, since the random bits are as large again."""

    def make(seeds: jax.Array) -> Any:
        found = jax.lax.map(lambda key: 0.02 * jax.random.normal(key, shape[-2:], dtype), seeds).reshape(shape)
        return quantize(found, kind) if kind else found

    return jax.jit(make, out_shardings=lie)


def batch_of(work: Work) -> Batch:
    """The tokens; where only some are learnt also their places, as the loader gives them."""
    found = arrays(work)
    mask = found["loss_mask"]
    return Batch(**found, at=None if work.loss_fraction == 1 else loss_positions(mask, int(mask.sum(1).max())))


def local_devices(work: Work) -> list[jax.Device]:
    """Where our side runs; a CPU is cut into the devices that are asked for, or one for each core if rows divide so.

    On a CPU many operations take one thread each: with a device for each core they run side by side.

    Raises:
      InputError: there are fewer.
    """
    cut = work.devices or math.gcd(work.batch // work.accumulate, cores())
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cut)
    found = jax.local_devices()
    wanted = work.devices or (math.gcd(cut, len(found)) if found[0].platform == "cpu" else 1)
    if len(found) < wanted:
        raise InputError(f"--devices {wanted}: there are {len(found)} here, ask for no more")
    return found[:wanted]


def ready(work: Work, layout: Layout, params: Any = None) -> Ready:
    """The step that ``experiments/train.py`` takes with the same settings, without clipping; ``params`` else drawn."""
    require_here(work.attention or "auto")
    known = {"dtype": jnp.dtype(work.dtype), "segments": work.documents}  # as a run counts them in its data
    model = Decoder(decoder_config(work.config, work.shape), **known, attention=work.attention or "auto")
    params = drawn(model, layout, work.quantize) if params is None else layout.place_base(params)
    spec = LoraSpec(target_modules=work.target, rank=work.rank, alpha=2 * work.rank)
    adapters = init_adapters(jax.random.key(0), params, spec)
    rows = work.batch // (layout.parts * work.accumulate)
    sizes: dict[str, Any] = {"rows": rows, "length": work.length, "dtype": model.dtype, "attention": model.attention}
    model = model.clone(remat=work.remat or choose_remat(model.config, params, adapters, **sizes))
    run = RunConfig(lora=spec, optimizer=CONFIGS[work.optimizer](), schedule=Constant(), max_grad_norm=None)
    tx, trained = make_training(run, params, adapters)
    numbers = numbers_of(run, adapters)
    step = make_train_step(adapted(model, spec), tx, layout, trained=trained, accumulate=work.accumulate)
    state = layout.state(jax.tree.map(np.asarray, init_state(adapters, tx(numbers), jax.random.key(1))))
    lora = sum(x.size for x in jax.tree.leaves(adapters))
    held = sum(pair["lora_a"].size for pair in pairs(adapters).values()) if work.optimizer in FREEZES_A else 0
    return Ready(step, state, params, layout.split(batch_of(work)), layout.place_base(numbers), lora, held, model.remat)


def prepare(work: Work) -> Side:
    """Compile the step and take it twice."""
    if "JAX_ENABLE_COMPILATION_CACHE" not in os.environ:  # compile times are of compiling, unless it is asked for
        jax.config.update("jax_enable_compilation_cache", False)
    devices = local_devices(work)
    device, before = devices[0], resident()
    made = ready(work, pmap_layout(devices))
    state = made.state
    jax.block_until_ready((state, made.params))  # else the compiler shares the cores with the drawing of weights
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
    about = {"compile_seconds": seconds, "device": device.device_kind, "platform": device.platform}
    about |= {"devices": len(devices), "lora_parameters": made.lora, "held": made.held, "versions": versions()}
    about |= {"remat": made.remat, "program_bytes": program_bytes(compiled)}
    return Side(run, about, host_memory(before) if device.platform == "cpu" else lambda: device_memory(device))


def program_bytes(compiled: Any) -> int | None:
    """What the compiled step holds at once on a device, arguments and results included; None where it does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    own = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return own + found.temp_size_in_bytes


def device_memory(device: jax.Device) -> dict[str, Any]:
    """What the allocator of the first device has counted since the process began: drawing and compiling included."""
    return {"peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use")}


def versions() -> dict[str, str]:
    """Of what our side is made of."""
    made = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    return {**made, "optax": optax.__version__}


if __name__ == "__main__":
    serve(prepare)
