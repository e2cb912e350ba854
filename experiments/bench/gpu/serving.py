"""Benchmarks outside the training step: generation, loading, checkpoints, a bank of adapters."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import ours
from bench.gpu.training import work_of
from bench.report import quartiles
from bench.work import Workload
from stablelora_jax import LoraSpec, adapted, init_adapters, load_pretrained
from stablelora_jax.generation.bank import banked, make_bank
from stablelora_jax.generation.decode import generate_tokens
from stablelora_jax.models.architecture import decoder_config
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import save_pretrained
from stablelora_jax.parallel import pmap_layout
from stablelora_jax.training import checkpoint

ROUNDS, BANK = 5, 8


def timed(call: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, Any]:
    """The seconds of ``call``: median and quartiles, after one untimed call."""
    call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    low, middle, high = quartiles(times)
    return {"seconds": middle, "seconds_quartiles": [low, high]}


def _work(shape: str, dtype: str, toy: bool, **more: Any) -> Workload:
    common = {"documents": 1, "rank": 16, "optimizer": "stable_lora", "batch": 8, "length": 64}
    return work_of(toy, shape=shape, dtype=dtype, **{**common, **more})


def _model(shape: str, dtype: str, toy: bool) -> tuple[Decoder, Any]:
    work = _work(shape, dtype, toy)
    model = Decoder(decoder_config(work.config, work.shape), dtype=jnp.dtype(dtype))
    return model, ours.random_params(model, pmap_layout(jax.devices()[:1]), None)


def _adapters(params: Any, seed: int = 0) -> tuple[Any, LoraSpec]:
    """Adapters with random A and B, so that none of them is zero."""
    spec = LoraSpec(target_modules="all-linear", rank=16, alpha=32)
    found = init_adapters(jax.random.key(seed), params, spec)
    return jax.tree.map(lambda x: 0.01 * jax.random.normal(jax.random.key(seed), x.shape, x.dtype), found), spec


def generation(*, shape: str, dtype: str, toy: bool = False) -> dict[str, Any]:
    """Greedy generation in new tokens per second, with and without an adapter: 1, 8 and 64 prompts of 128 tokens."""
    model, params = _model(shape, dtype, toy)
    adapters, spec = _adapters(params)
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    for rows in (2,) if toy else (1, 8, 64):
        tokens = np.random.default_rng(0).integers(1, model.config.vocab_size, (rows, 16 if toy else 128))
        given, new = (tokens, np.ones_like(tokens)), 8 if toy else 128
        lora = {"params": params, "lora": adapters}
        with_adapter = timed(lambda lora=lora, given=given, new=new: generate_tokens(
            adapted(model, spec), lora, *given, max_new_tokens=new))  # fmt: skip
        base = timed(lambda given=given, new=new: generate_tokens(
            model, {"params": params}, *given, max_new_tokens=new))  # fmt: skip
        for name, cost in {"adapter": with_adapter, "base": base}.items():
            found[f"{rows} prompts, {name}"] = {**cost, "tokens_per_second": rows * new / cost["seconds"]}
    return found


def loading(*, shape: str, dtype: str, toy: bool = False) -> dict[str, Any]:
    """The seconds to load a model from disk (files in the page cache) to arrays on the device."""
    model, params = _model(shape, dtype, toy)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, model, params)
        del params
        cost = timed(lambda: jax.block_until_ready(load_pretrained(folder, dtype=dtype)[1]), 3)
    return {**cost, "bytes": size, "bytes_per_second": size / cost["seconds"], "device": jax.devices()[0].device_kind}


def saving(*, shape: str, dtype: str, toy: bool = False) -> dict[str, Any]:
    """The seconds of a step, and of a checkpoint: blocking the loop, and until it is written in the background."""
    work = _work(shape, dtype, toy, **({"batch": 2} if toy else {"length": 2048}))
    layout = pmap_layout(jax.devices()[:1])
    made = ours.make_step(work, layout)
    state = made.state

    def step() -> None:
        nonlocal state
        state, metrics = made.step(state, made.params, made.batch, made.numbers)
        jax.block_until_ready(metrics["loss"])

    cost, blocked, total = timed(step), [], []
    with tempfile.TemporaryDirectory() as folder, checkpoint.open_manager(Path(folder) / "c") as manager:
        for number in range(ROUNDS):
            began = time.perf_counter()
            checkpoint.save(manager, number + 1, layout.fetch(state))
            blocked.append(time.perf_counter() - began)
            checkpoint.wait(manager)
            total.append(time.perf_counter() - began)
            step()
    size = sum(x.nbytes for x in jax.tree.leaves(layout.fetch(state)))
    found = {"step_seconds": cost["seconds"], "bytes": size, "device": jax.devices()[0].device_kind}
    return {**found, "held_seconds": quartiles(blocked)[1], "saved_seconds": quartiles(total)[1]}


def bank(*, shape: str, dtype: str, toy: bool = False) -> dict[str, Any]:
    """A forward pass of 8 rows, each with its own adapter from a bank of 8, compared with one adapter for all rows."""
    model, params = _model(shape, dtype, toy)
    parts = [_adapters(params, seed) for seed in range(BANK)]
    adapter_bank = make_bank(params, parts)
    tokens = jnp.ones((BANK, 32 if toy else 512), jnp.int32)
    adapters, spec = parts[0]

    def many(params: Any, bank: Any, tokens: Any) -> Any:
        return banked(model).apply({"params": params, "bank": bank, "rows": jnp.arange(BANK)}, tokens)

    def one(params: Any, adapters: Any, tokens: Any) -> Any:
        return adapted(model, spec).apply({"params": params, "lora": adapters}, tokens)

    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "rows": BANK, "length": tokens.shape[1]}
    for name, call, given in (("bank", jax.jit(many), adapter_bank), ("one adapter", jax.jit(one), adapters)):
        found[name] = timed(lambda call=call, given=given: jax.block_until_ready(call(params, given, tokens)))
    return {**found, "ratio": found["bank"]["seconds"] / found["one adapter"]["seconds"]}
