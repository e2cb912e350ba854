"""A dry run: the training step is compiled from shapes alone, without weights and data, and its needs are printed.

Memory is the compiler's analysis for one device; on a CPU its ``peak`` leaves the temporaries out. FLOPs
a token are those of :mod:`stablelora_jax.training.flops`; the compiler counts a loop over layers as one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stablelora_jax.config.run import RunConfig
from stablelora_jax.data import Batch, bucket
from stablelora_jax.lora.apply import adapted
from stablelora_jax.lora.dense import is_dense
from stablelora_jax.lora.pairs import pairs
from stablelora_jax.lora.plain import plain_adapters
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import match_target_modules
from stablelora_jax.lora.transform import adapter_shapes
from stablelora_jax.models.attention import SEGMENTS
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.pretrained.load import abstract_params
from stablelora_jax.models.pretrained.shapes import architecture
from stablelora_jax.parallel import Layout
from stablelora_jax.quantization import quantize_params
from stablelora_jax.runs.build import make_allocation, make_hyperparams, make_objective, make_training
from stablelora_jax.runs.prepare import configure_decoder, make_layout
from stablelora_jax.training.flops import flops_per_token
from stablelora_jax.training.step import Hyperparams, init_state, make_train_step
from stablelora_jax.utils.errors import InputError


class Shapes(NamedTuple):
    """A training step and the shapes of its arguments; nothing is allocated."""

    model: Decoder
    step: Any  # make_train_step's
    state: Any  # without the axis of devices
    params: Any
    batch: Batch  # the longest rows of the run, over all devices, where every token is a loss token
    hyperparams: Hyperparams
    layout: Layout
    spec: LoraSpec


def shapes(config: RunConfig) -> Shapes:
    """The step of ``config`` at full size.

    Raises:
      InputError: an unknown model, a target that matches nothing, a length or batch that does not fit.
    """
    found = architecture(config.model.path)
    layout = make_layout(config, found)
    if config.max_length > found.max_position_embeddings:
        raise InputError(
            f"max_length {config.max_length} is more than the model's {found.max_position_embeddings}: lower it"
        )
    layout.require_rows(config.batch_size, config.gradient_accumulation_steps)
    tied = found.tie_word_embeddings and not config.model.untie
    model = Decoder(replace(found, tie_word_embeddings=tied), dtype=jnp.dtype(config.model.dtype))
    params, key = abstract_params(model), jax.random.key(0)
    if config.model.quantize:
        params = jax.eval_shape(partial(quantize_params, kind=config.model.quantize), params)
    adapters = adapter_shapes(params, config.lora)
    own = make_allocation(config)
    adapters = adapters if own.start is None else jax.eval_shape(own.start, adapters)
    tx, trained = make_training(config, params, adapters)
    hyperparams = jax.eval_shape(lambda a: make_hyperparams(config, a), adapters)
    state = jax.eval_shape(lambda a, n: init_state(a, tx(n), key), adapters, hyperparams)
    T = config.max_length if config.data.batching == "pack" else bucket(config.max_length)
    row: Any = jax.ShapeDtypeStruct((config.batch_size, T), jnp.int32)
    segments = SEGMENTS if config.data.batching == "pack" else 1  # of a packed row: what cuDNN's attention takes
    placed = layout.abstract(params, "base")
    model = configure_decoder(model, config, layout, placed, adapters, length=T, segments=segments)
    low_rank = adapted(model, config.lora)
    parts: dict[str, Any] = {"trained": trained, "seen": own.seen, "penalty": own.penalty}
    parts |= {"objective": make_objective(config), "accumulate": config.gradient_accumulation_steps}
    step = make_train_step(low_rank, tx, layout, **parts)
    return Shapes(model, step, state, params, Batch(row, row, row, row), hyperparams, layout, config.lora)


def dry_run(config: RunConfig, log_fn: Callable[[str], None] = print) -> dict[str, Any]:
    """Compile the step, print its needs, and return them.

    In bytes a device: ``arguments``, ``outputs``, ``temporaries``, ``aliased`` (outputs in place of arguments),
    ``peak``, and ``total``, the first three without what is aliased. ``flops_per_token`` is the formula's;
    ``compiled_flops`` is what the compiler counts for the step, None where it does not.

    Raises:
      InputError: as :func:`shapes`.
    """
    made = shapes(config)
    compiled = made.step.lower(*arguments(made)).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    rows, T = made.batch.tokens.shape
    needs = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    needs["total"] = needs["arguments"] + needs["outputs"] + needs["temporaries"] - needs["aliased"]
    found = {**needs, "flops_per_token": flops_of(made), "compiled_flops": cost.get("flops")}
    base = config.model.path or "the base of this package"
    log_fn(f"{base}: a step of {rows} rows of {T} tokens over {made.layout.title}; for each device:")
    for name, size in needs.items():
        log_fn(f"{name:12} {size / 2**20:12,.1f} MiB")
    log_fn(f"FLOPs a token: {found['flops_per_token']:,} = 4 P + 6 P_lora + 6 L T d")
    if found["compiled_flops"]:
        counted = found["compiled_flops"] * jax.device_count() / (rows * T)
        log_fn(f"the compiler counts {counted:,.0f} a token, with each loop (layers, micro-batches) as one turn")
    return found


def arguments(made: Shapes) -> tuple[Any, ...]:
    """The arguments of the step, as shapes and shardings."""
    place = made.layout.abstract
    state, params, hyperparams = place(made.state, "state"), place(made.params, "base"), place(made.hyperparams, "base")
    return state, params, place(made.batch, "rows"), hyperparams


def flops_of(made: Shapes) -> int:
    """The formula's FLOPs a token, for training's longest rows where every token is a loss token."""
    adapters, targets = made.state.adapters, match_target_modules(made.params, made.state.adapters, made.spec)
    plain = jax.eval_shape(lambda adapters: plain_adapters(adapters, targets, made.spec), adapters)
    count = sum(p[name].size for p in pairs(plain).values() for name in p)
    if is_dense(made.spec):  # the gradient with respect to the kernel, 2 of a pair's 6
        count = sum(math.prod((*target.stack, *target.size)) for target in targets.values()) / 3
    return round(flops_per_token(made.model.config, count, made.batch.tokens.shape[-1]))
