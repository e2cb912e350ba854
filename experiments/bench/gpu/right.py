"""Correctness: the device compared with the CPU, in one process. ``ok`` is whether all differences are within bounds.

On a GPU the default precision of a float32 matmul is TF32. float32 is therefore compared at ``highest`` precision; the
default is reported without a bound. In bfloat16 the device may differ from float32 by twice what the CPU does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import ours
from bench.gpu.training import work_of
from bench.work import Workload, arrays
from stablelora_jax import LoraSpec, init_adapters
from stablelora_jax.config.optimizer import CONFIGS
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import Constant
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.parallel import Layout, mesh_layout, pmap_layout
from stablelora_jax.quantization import FORMATS, dequantize, quantize
from stablelora_jax.runs.build import make_hyperparams, make_training

FLOAT32_TOLERANCE, UPDATE_TOLERANCE = 1e-3, 1e-2  # relative: of float32 values; of the change of the adapters
STEPS = 3


def cpu() -> jax.Device:
    """The CPU; the device itself where there is no other."""
    return jax.devices("cpu")[0]


def relative_error(found: Any, wanted: Any) -> float:
    """The largest difference of two trees, relative to the root mean square of each ``wanted`` leaf; NaN if any is."""

    def one(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max(initial=0.0) / (np.sqrt(np.mean(b * b)) or 1.0))

    return float(np.max([0.0, *jax.tree.leaves(jax.tree.map(one, found, wanted))]))


def relative_norm_error(found: Any, wanted: Any) -> float:
    """The norm of the difference of two trees, relative to the norm of ``wanted``.

    For updates of Adam, where single entries with a gradient near zero differ by rounding without significance.
    """
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    pairs = [(np.ravel(np.asarray(a, np.float64)), np.ravel(np.asarray(b, np.float64))) for a, b in leaves]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def check_bounds(differences: dict[str, float], bounds: dict[str, float]) -> dict[str, Any]:
    """The result of a row: ``ok``, ``differences``, ``bounds`` and ``device``."""
    ok = all(value <= bounds.get(name, np.inf) for name, value in differences.items())  # False for NaN
    return {"ok": ok, "differences": differences, "bounds": bounds, "device": jax.devices()[0].device_kind}


def logits(*, toy: bool = False) -> dict[str, Any]:
    """Logits of a random decoder with the shape of Qwen2-0.5B."""
    work = work_of(toy, shape="qwen2-0.5b", batch=2, length=64, documents=2, rank=1, dtype="float32", optimizer="adamw")
    found = arrays(work)
    rows = [found[key] for key in ("tokens", "positions", "segment_ids")]
    plain = Decoder(decoder_config(work.config, work.shape))
    params = ours.random_params(plain, pmap_layout([cpu()]), None)

    def run(dtype: str, device: jax.Device, precision: str) -> np.ndarray:
        model = plain.clone(dtype=jnp.dtype(dtype), attention="xla" if device is cpu() else "auto", segments=2)
        own = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), params), device)
        with jax.default_matmul_precision(precision):
            call = jax.jit(lambda params, *rows: model.apply({"params": params}, *rows))
            return np.asarray(call(own, *jax.device_put(rows, device)), np.float32)

    here, exact = jax.devices()[0], run("float32", cpu(), "highest")
    half = relative_error(run("bfloat16", cpu(), "default"), exact)
    differences = {
        "float32, highest": relative_error(run("float32", here, "highest"), exact),
        "float32, default": relative_error(run("float32", here, "default"), exact),
        "bfloat16": relative_error(run("bfloat16", here, "default"), exact),
        "bfloat16, CPU": half,
    }
    return check_bounds(differences, {"float32, highest": FLOAT32_TOLERANCE, "bfloat16": 2 * half + FLOAT32_TOLERANCE})


def optimizers(*, toy: bool = False) -> dict[str, Any]:
    """The change of the adapters in a few steps of each optimizer, from the same adapters and gradients."""
    work = small_workload()
    params = ours.random_params(Decoder(decoder_config(work.config, work.shape)), pmap_layout([cpu()]), None)
    spec = LoraSpec(target_modules=["q_proj"] if toy else ["q_proj", "down_proj"], rank=4, alpha=8)
    rng = np.random.default_rng(0)

    def random_like(tree: Any) -> Any:
        return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), tree)

    adapters = random_like(init_adapters(jax.random.key(0), params, spec))
    gradients = [random_like(adapters) for _ in range(STEPS)]
    differences = {}
    for name in CONFIGS:
        run = RunConfig(lora=spec, optimizer=CONFIGS[name](), schedule=Constant())
        tx = make_training(run, params, adapters)[0](make_hyperparams(run, adapters))
        step = jax.jit(partial(_update, tx))
        found = [_updated(tx, step, adapters, gradients, device) for device in (cpu(), jax.devices()[0])]
        here, there = (jax.tree.map(np.subtract, after, adapters) for after in found[::-1])
        differences[name] = relative_norm_error(here, there)
    return check_bounds(differences, dict.fromkeys(differences, UPDATE_TOLERANCE))


def _update(tx: Any, state: Any, adapters: Any, gradient: Any) -> Any:
    updates, state = tx.update(gradient, state, adapters)
    return state, optax.apply_updates(adapters, updates)


def _updated(tx: Any, step: Any, adapters: Any, gradients: list[Any], device: jax.Device) -> Any:
    """The adapters after one step per gradient, as host arrays."""
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        adapters = jax.device_put(adapters, device)
        state = jax.device_put(tx.init(adapters), device)
        for gradient in gradients:
            state, adapters = step(state, adapters, jax.device_put(gradient, device))
    return jax.device_get(adapters)


def quantized(*, toy: bool = False) -> dict[str, Any]:
    """Codes and dequantised values of each format, and the losses of a few steps on a quantised base."""
    shape = (2, 64, 64) if toy else (2, 896, 4864)
    kernel = np.random.default_rng(0).normal(scale=0.02, size=shape).astype(np.float32)
    differences: dict[str, float] = {}
    for kind in FORMATS:
        here, there = (
            jax.jit(lambda x, kind=kind: quantize(x, kind))(jax.device_put(kernel, device))
            for device in (jax.devices()[0], cpu())
        )
        leaves = list(zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True))
        codes = [(np.asarray(a), np.asarray(b)) for a, b in leaves if jnp.issubdtype(a.dtype, jnp.integer)]
        differences[f"{kind}: share of codes that differ"] = max(float(np.mean(a != b)) for a, b in codes)
        values = dequantize(jax.device_put(there, jax.devices()[0]))
        differences[f"{kind}: values of the same codes"] = relative_error(values, dequantize(there))
        work = small_workload(quantize=kind)
        losses = [train_steps(work, pmap_layout([device]))[0] for device in (cpu(), jax.devices()[0])]
        differences[f"{kind}: losses of {STEPS} steps"] = relative_error(losses[1], losses[0])
    return check_bounds(differences, dict.fromkeys(differences, FLOAT32_TOLERANCE))


def layouts(*, toy: bool = False) -> dict[str, Any]:
    """Losses and adapters of a few steps: pmap compared with a mesh of one device, and with the CPU."""
    work, here = small_workload(), jax.devices()[0]
    states = {"cpu": train_steps(work, pmap_layout([cpu()])), "pmap": train_steps(work, pmap_layout([here]))}
    states["mesh"] = train_steps(work, mesh_layout(devices=[here]))
    differences = {}
    for one, other in (("pmap", "mesh"), ("pmap", "cpu")):
        (losses, adapters), (wanted_losses, wanted_adapters) = states[one], states[other]
        differences[f"{one} and {other}, losses"] = relative_error(losses, wanted_losses)
        differences[f"{one} and {other}, adapters"] = relative_norm_error(adapters, wanted_adapters)
    return check_bounds(differences, dict.fromkeys(differences, FLOAT32_TOLERANCE))


def small_workload(**more: Any) -> Workload:
    """The training step of a tiny decoder in float32."""
    given = {"shape": "llama-15m", "batch": 4, "length": 64, "documents": 2, "rank": 4, "dtype": "float32"}
    return work_of(True, **given, optimizer="stable_lora", attention="xla", **more)


def train_steps(work: Workload, layout: Layout) -> tuple[list[float], Any]:
    """The losses of a few steps, and the adapters after them as host arrays."""
    with jax.default_matmul_precision("highest"):
        model = Decoder(decoder_config(work.config, work.shape))
        base = ours.random_params(model, pmap_layout([cpu()]), work.quantize)  # "rbg" keys are not portable: CPU only
        made = ours.make_step(work, layout, base)
        state, losses = made.state, []
        for _ in range(STEPS):
            state, metrics = made.step(state, made.params, made.batch, made.numbers)
            losses.append(float(layout.fetch(metrics["loss"])))
    return losses, layout.fetch(state.adapters)
