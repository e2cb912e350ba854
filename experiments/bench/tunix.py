"""The other side of ``bench.py train --peer tunix``: tunix's model on NNX, Qwix's LoRA, optax's AdamW.

The step is that of tunix's ``PeftTrainer``: no recomputation, the loss from all logits and one-hot labels, gradients of
the LoRA parameters and their norm, ``nnx.jit`` that donates the optimizer, the graph of the modules cached. It runs on
one device, of a CPU all its threads: what its user gets who asks for nothing. Weights are random.

Adapters and logits are float32, as on the other sides. With a bfloat16 base the factors are cast for the products;
tunix by itself holds them in the dtype of the base. Its Llama turns by angles of its own (a fixed base, no scaling of
long texts), which cost the same. Like the other sides it imports nothing of ``stablelora_jax``, which its environment
need not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from bench.side import Side, host_memory, resident, serve
from bench.work import Work, arrays

MODELS = {"llama": ("llama3", "Llama3"), "qwen2": ("qwen2", "Qwen2")}  # tunix.models.<first>.model.<second>
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class InputError(ValueError):
    """What was asked for cannot be had here."""


def prepare(work: Work) -> Side:
    """Take the step a few times.

    Raises:
      ModuleNotFoundError: google-tunix is not here.
      InputError: micro-batches, which its trainer spreads over calls.
    """
    if work.accumulate > 1:
        raise InputError("tunix is measured without micro-batches: leave out --accumulate")
    try:
        import jax
        import qwix  # noqa: F401
        from flax import nnx

        import_module("tunix.models.llama3.model")
    except ImportError as error:
        said = f"google-tunix is not here ({error}): --peer-python says which interpreter has it"
        raise ModuleNotFoundError(said) from None
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are of compiling
    device, before = jax.local_devices()[0], resident()
    model = adapted(work)
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
    about = {"compile_seconds": max(0.0, times[0] - times[-1]), "lora_parameters": lora, "versions": versions()}
    about |= {"device": device.device_kind, "platform": device.platform}
    if device.platform == "cpu":
        return Side(run, about, host_memory(before))
    return Side(run, about, lambda: {"peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use")})


def base(work: Work) -> tuple[type, Any]:
    """The class of the model and its config.

    Raises:
      InputError: tunix has no such model.
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
    own = {"use_tied_embedding": tied, "dtype": dtype, "param_dtype": dtype}
    own = {"weight_tying": tied} if kind == "llama" else own
    return getattr(module, MODELS[kind][1]), module.ModelConfig(**sizes, rope_theta=raw.get("rope_theta", 1e4), **own)


def targets(work: Work) -> str:
    """The pattern of the paths of the modules that are adapted.

    Raises:
      InputError: a name that is none of :data:`LINEAR`; Qwix would leave the model as it is.
    """
    names = LINEAR if work.target == "all-linear" else work.target
    unknown = [name for name in names if name not in LINEAR]
    if unknown:
        raise InputError(f"no target {unknown[0]!r} in tunix's model: choose of {', '.join(LINEAR)}")
    return f".*/({'|'.join(names)})"


def adapted(work: Work) -> Any:
    """The model with its adapters; its arrays are made once, each in the dtype in which it stays."""
    import jax
    import qwix
    from flax import nnx

    kind, config = base(work)
    provider = qwix.LoraProvider(module_path=targets(work), rank=work.rank, alpha=2 * work.rank)

    def make() -> Any:
        model = kind(config, rngs=nnx.Rngs(0))
        return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())

    graph, state = nnx.split(nnx.eval_shape(make))
    count = iter(range(10_000))

    def draw(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        dtype = "float32" if "_lora_" in name else work.dtype
        if len(leaf.shape) == 1 or "_lora_b" in name:
            return jax.numpy.full(leaf.shape, not ("bias" in name or "_lora_b" in name), dtype)
        return 0.02 * jax.random.normal(jax.random.key(next(count), impl="rbg"), leaf.shape, dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def training_step(work: Work, model: Any) -> Callable[[Any], Any]:
    """Takes a batch, changes the model's adapters, and gives the loss and the norm of the gradients."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    def loss_of(model: Any, batch: Any) -> Any:
        graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
        half = jax.tree.map(lambda x: x.astype(work.dtype), lora)
        segments, labels, learnt = batch["segment_ids"], batch["tokens"][:, 1:], batch["loss_mask"][:, 1:, None]
        seen = jnp.tril(segments[:, :, None] == segments[:, None, :])
        logits, _ = nnx.merge(graph, half, rest)(batch["tokens"], batch["positions"], None, seen)
        found = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        return -jnp.sum(found * (jax.nn.one_hot(labels, found.shape[-1]) * learnt)) / jnp.sum(learnt)

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
    """Of what this side is made of."""
    return {name: metadata.version(name) for name in ("google-tunix", "qwix", "jax", "flax", "optax")}


if __name__ == "__main__":
    serve(prepare)
