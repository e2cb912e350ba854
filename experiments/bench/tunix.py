"""The peer of ``bench.py train --peer tunix``: tunix's model in NNX, Qwix's LoRA, optax's AdamW.

The step is that of tunix's ``PeftTrainer``: no rematerialisation, the loss from all logits and one-hot labels,
gradients of the LoRA parameters and their norm, ``nnx.jit`` with a donated optimizer, a cached module graph. It runs on
one device (on a CPU, with all threads), which is tunix's default. Weights are random.

Adapters and logits are float32, as on the other sides. With a bfloat16 base, A and B are cast for the matmuls; by
default tunix keeps them in the dtype of the base. Its Llama has other RoPE frequencies (fixed theta, no scaling for
long contexts), at the same cost. It imports nothing of ``stablelora_jax``, which its environment need not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from bench.side import Side, host_memory, resident, serve
from bench.work import Workload, arrays

MODELS = {"llama": ("llama3", "Llama3"), "qwen2": ("qwen2", "Qwen2")}  # tunix.models.<first>.model.<second>
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class InputError(ValueError):
    """The workload cannot be run by this side; matched by name in :mod:`bench.side`."""


def prepare(work: Workload) -> Side:
    """Create the model and warm up.

    Raises:
      ModuleNotFoundError: google-tunix is not installed.
      InputError: the workload has micro-batches, which tunix's trainer spreads over calls.
    """
    if work.accumulate > 1:
        raise InputError("tunix is measured without micro-batches: omit --accumulate")
    try:
        import jax
        import qwix  # noqa: F401
        from flax import nnx

        import_module("tunix.models.llama3.model")
    except ImportError as error:
        message = f"google-tunix is not installed ({error}): set --peer-python to an interpreter that has it"
        raise ModuleNotFoundError(message) from None
    jax.config.update("jax_enable_compilation_cache", False)  # compile_seconds must include the compilation
    device, before = jax.local_devices()[0], resident()
    model = make_model(work)
    step = training_step(work, model)
    batch = jax.device_put(arrays(work), device)
    jax.block_until_ready((nnx.state(model), batch))

    def run(count: int) -> float:
        for _ in range(count):
            loss, _ = step(batch)
        jax.block_until_ready(nnx.state(model, nnx.LoRAParam))
        return float(loss)

    times = [clock(run) for _ in range(3)]
    lora = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    metadata = {"compile_seconds": max(0.0, times[0] - times[-1]), "lora_parameters": lora, "versions": versions()}
    metadata |= {"device": device.device_kind, "platform": device.platform}
    if device.platform == "cpu":
        return Side(run, metadata, host_memory(before))
    return Side(run, metadata, lambda: {"peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use")})


def model_and_config(work: Workload) -> tuple[type, Any]:
    """The model class and its config.

    Raises:
      InputError: tunix does not implement the architecture.
    """
    import jax.numpy as jnp

    raw, kind = work.config, work.config["model_type"]
    if kind not in MODELS or raw.get("attention_bias") or raw.get("mlp_bias"):
        raise InputError(f"tunix has no model for the {kind} of {work.shape}")
    module = import_module(f"tunix.models.{MODELS[kind][0]}.model")
    heads, tied = raw["num_attention_heads"], raw.get("tie_word_embeddings", False)
    sizes = {"num_layers": raw["num_hidden_layers"], "embed_dim": raw["hidden_size"], "num_heads": heads}
    sizes |= {"hidden_dim": raw["intermediate_size"], "vocab_size": raw["vocab_size"]}
    sizes |= {"head_dim": raw.get("head_dim") or raw["hidden_size"] // heads}
    sizes |= {"num_kv_heads": raw.get("num_key_value_heads") or heads, "norm_eps": raw.get("rms_norm_eps", 1e-6)}
    dtype = jnp.dtype(work.dtype)
    options = {"use_tied_embedding": tied, "dtype": dtype, "param_dtype": dtype}
    options = {"weight_tying": tied} if kind == "llama" else options
    config = module.ModelConfig(**sizes, rope_theta=raw.get("rope_theta", 1e4), **options)
    return getattr(module, MODELS[kind][1]), config


def target_pattern(work: Workload) -> str:
    """The regular expression for the paths of the adapted modules.

    Raises:
      InputError: a name that is not in :data:`LINEAR`; Qwix would silently leave it unadapted.
    """
    names = LINEAR if work.target == "all-linear" else work.target
    unknown = [name for name in names if name not in LINEAR]
    if unknown:
        raise InputError(f"no target {unknown[0]!r} in tunix's model: choose from {', '.join(LINEAR)}")
    return f".*/({'|'.join(names)})"


def make_model(work: Workload) -> Any:
    """The model with its adapters; each array is created once, in its final dtype."""
    import jax
    import qwix
    from flax import nnx

    kind, config = model_and_config(work)
    provider = qwix.LoraProvider(module_path=target_pattern(work), rank=work.rank, alpha=2 * work.rank)

    def make() -> Any:
        model = kind(config, rngs=nnx.Rngs(0))
        return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())

    graph, state = nnx.split(nnx.eval_shape(make))
    count = iter(range(10_000))

    def initialize(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        dtype = "float32" if "_lora_" in name else work.dtype
        if len(leaf.shape) == 1 or "_lora_b" in name:
            return jax.numpy.full(leaf.shape, not ("bias" in name or "_lora_b" in name), dtype)
        return 0.02 * jax.random.normal(jax.random.key(next(count), impl="rbg"), leaf.shape, dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(initialize, state))


def training_step(work: Workload, model: Any) -> Callable[[Any], Any]:
    """The compiled step: takes a batch, updates the model's adapters in place, returns the loss and gradient norm."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    def loss_of(model: Any, batch: Any) -> Any:
        graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
        cast = jax.tree.map(lambda x: x.astype(work.dtype), lora)
        segments, labels, loss_mask = batch["segment_ids"], batch["tokens"][:, 1:], batch["loss_mask"][:, 1:, None]
        attention_mask = jnp.tril(segments[:, :, None] == segments[:, None, :])
        logits, _ = nnx.merge(graph, cast, rest)(batch["tokens"], batch["positions"], None, attention_mask)
        log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        one_hot = jax.nn.one_hot(labels, log_probs.shape[-1])
        return -jnp.sum(log_probs * (one_hot * loss_mask)) / jnp.sum(loss_mask)

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
        norm = optax.global_norm(grads)
        optimizer.update(model, grads)
        return loss, norm

    optimizer = nnx.Optimizer(model, optax.adamw(1e-4, weight_decay=0.01), wrt=nnx.LoRAParam)
    return nnx.cached_partial(nnx.jit(step, donate_argnames=("optimizer",)), model, optimizer)


def clock(run: Any) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    run(1)
    return time.perf_counter() - began


def versions() -> dict[str, str]:
    """The versions of this side's packages."""
    return {name: metadata.version(name) for name in ("google-tunix", "qwix", "jax", "flax", "optax")}


if __name__ == "__main__":
    serve(prepare)
