"""Does it run right: the device beside the CPU, in one process. ``ok`` says whether all differences are in bounds.

On a GPU a float32 product is by default a TF32 product, so float32 is compared at ``highest`` precision, and the
default is told beside it. In bfloat16 the device may be as far from float32 as the CPU's bfloat16 is, and as far again.
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
from bench.work import Work, arrays
from stablelora_jax import LoraSpec, init_adapters
from stablelora_jax.config.optimizer import CONFIGS
from stablelora_jax.config.run import RunConfig
from stablelora_jax.config.schedule import Constant
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.parallel import Layout, mesh_layout, pmap_layout
from stablelora_jax.quantization import FORMATS, dequantize, quantize
from stablelora_jax.runs.build import make_training, make_hyperparams

FLOAT32, CHANGE, STEPS = 1e-3, 1e-2, 3  # bounds: of values, and of what steps change; steps


def cpu() -> jax.Device:
    """The one beside the device; where there is no other device, the same."""
    return jax.devices("cpu")[0]


def apart(found: Any, wanted: Any) -> float:
    """The greatest difference of two trees, over the root mean square of each leaf that is wanted; NaN if one is."""

    def one(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max(initial=0.0) / (np.sqrt(np.mean(b * b)) or 1.0))

    return float(np.max([0.0, *jax.tree.leaves(jax.tree.map(one, found, wanted))]))


def apart_in_norm(found: Any, wanted: Any) -> float:
    """The norm of the difference of two trees over that of what is wanted.

    For what Adam has divided by: there a gradient of nearly zero makes an entry differ, and says nothing.
    """
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    pairs = [(np.ravel(np.asarray(a, np.float64)), np.ravel(np.asarray(b, np.float64))) for a, b in leaves]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def judged(differences: dict[str, float], bounds: dict[str, float]) -> dict[str, Any]:
    """What a row of this section holds."""
    ok = all(value <= bounds.get(name, np.inf) for name, value in differences.items())  # NaN is not
    return {"ok": ok, "differences": differences, "bounds": bounds, "device": jax.devices()[0].device_kind}


def logits(*, toy: bool = False) -> dict[str, Any]:
    """Logits of a random decoder of half a billion parameters."""
    work = work_of(toy, shape="qwen2-0.5b", batch=2, length=64, documents=2, rank=1, dtype="float32", optimizer="adamw")
    found = arrays(work)
    rows = [found[key] for key in ("tokens", "positions", "segment_ids")]
    plain = Decoder(decoder_config(work.config, work.shape))
    params = ours.drawn(plain, pmap_layout([cpu()]), None)

    def run(dtype: str, device: jax.Device, precision: str) -> np.ndarray:
        model = plain.clone(dtype=jnp.dtype(dtype), attention="xla" if device is cpu() else "auto", segments=2)
        own = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), params), device)
        with jax.default_matmul_precision(precision):
            call = jax.jit(lambda params, *rows: model.apply({"params": params}, *rows))
            return np.asarray(call(own, *jax.device_put(rows, device)), np.float32)

    here, exact = jax.devices()[0], run("float32", cpu(), "highest")
    half = apart(run("bfloat16", cpu(), "default"), exact)
    differences = {
        "float32, highest": apart(run("float32", here, "highest"), exact),
        "float32, default": apart(run("float32", here, "default"), exact),
        "bfloat16": apart(run("bfloat16", here, "default"), exact),
        "bfloat16, CPU": half,
    }
    return judged(differences, {"float32, highest": FLOAT32, "bfloat16": 2 * half + FLOAT32})


def optimizers(*, toy: bool = False) -> dict[str, Any]:
    """A few steps of each optimizer from the same adapters and gradients: how they change, beside the CPU's change."""
    work = small()
    params = ours.drawn(Decoder(decoder_config(work.config, work.shape)), pmap_layout([cpu()]), None)
    spec = LoraSpec(target_modules=["q_proj"] if toy else ["q_proj", "down_proj"], rank=4, alpha=8)
    rng = np.random.default_rng(0)

    def drawn(tree: Any) -> Any:
        return jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), tree)

    adapters = drawn(init_adapters(jax.random.key(0), params, spec))
    gradients = [drawn(adapters) for _ in range(STEPS)]
    differences = {}
    for name in CONFIGS:
        run = RunConfig(lora=spec, optimizer=CONFIGS[name](), schedule=Constant())
        tx = make_training(run, params, adapters)[0](make_hyperparams(run, adapters))
        step = jax.jit(partial(_update, tx))
        found = [_updated(tx, step, adapters, gradients, device) for device in (cpu(), jax.devices()[0])]
        here, there = (jax.tree.map(np.subtract, after, adapters) for after in found[::-1])
        differences[name] = apart_in_norm(here, there)
    return judged(differences, dict.fromkeys(differences, CHANGE))


def _update(tx: Any, state: Any, adapters: Any, gradient: Any) -> Any:
    updates, state = tx.update(gradient, state, adapters)
    return state, optax.apply_updates(adapters, updates)


def _updated(tx: Any, step: Any, adapters: Any, gradients: list[Any], device: jax.Device) -> Any:
    """The adapters after the steps, on the host."""
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        adapters = jax.device_put(adapters, device)
        state = jax.device_put(tx.init(adapters), device)
        for gradient in gradients:
            state, adapters = step(state, adapters, jax.device_put(gradient, device))
    return jax.device_get(adapters)


def quantized(*, toy: bool = False) -> dict[str, Any]:
    """Codes and values of each format, and the loss of a step on a base that is held in it."""
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
        moved = dequantize(jax.device_put(there, jax.devices()[0]))
        differences[f"{kind}: values of the same codes"] = apart(moved, dequantize(there))
        work = small(quantize=kind)
        losses = [trained(work, pmap_layout([device]))[0] for device in (cpu(), jax.devices()[0])]
        differences[f"{kind}: losses of {STEPS} steps"] = apart(losses[1], losses[0])
    return judged(differences, dict.fromkeys(differences, FLOAT32))


def layouts(*, toy: bool = False) -> dict[str, Any]:
    """Losses and adapters of a few steps: pmap beside a mesh, on one device, and both beside the CPU."""
    work, here = small(), jax.devices()[0]
    states = {"cpu": trained(work, pmap_layout([cpu()])), "pmap": trained(work, pmap_layout([here]))}
    states["mesh"] = trained(work, mesh_layout(devices=[here]))
    differences = {}
    for one, other in (("pmap", "mesh"), ("pmap", "cpu")):
        (losses, adapters), (wanted, trained_there) = states[one], states[other]
        differences[f"{one} and {other}, losses"] = apart(losses, wanted)
        differences[f"{one} and {other}, adapters"] = apart_in_norm(adapters, trained_there)
    return judged(differences, dict.fromkeys(differences, FLOAT32))


def small(**more: Any) -> Work:
    """A small decoder's training step in float32."""
    given = {"shape": "llama-15m", "batch": 4, "length": 64, "documents": 2, "rank": 4, "dtype": "float32"}
    return work_of(True, **given, optimizer="stable_lora", attention="xla", **more)


def trained(work: Work, layout: Layout) -> tuple[list[float], Any]:
    """Losses of a few steps, and the adapters after them."""
    with jax.default_matmul_precision("highest"):
        model = Decoder(decoder_config(work.config, work.shape))
        base = ours.drawn(model, pmap_layout([cpu()]), work.quantize)  # elsewhere the same keys may draw others
        made = ours.ready(work, layout, base)
        state, losses = made.state, []
        for _ in range(STEPS):
            state, metrics = made.step(state, made.params, made.batch, made.numbers)
            losses.append(float(layout.fetch(metrics["loss"])))
    return losses, layout.fetch(state.adapters)
