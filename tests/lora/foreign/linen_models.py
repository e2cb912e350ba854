"""Rows of Linen models: each with the adapters that its author expects."""

from __future__ import annotations

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stablelora_jax import LoraSpec
from tests.helpers import random_params
from tests.lora.foreign.laws import Row
from tests.lora.foreign.linen_experts import DenseMixture, EinsumExperts, RaggedMixture, SlotMixture, VmapExperts
from tests.lora.foreign.linen_language import T5, Gemma
from tests.lora.foreign.linen_vision import UNet, ViT, image

R = 2


def pair(inner: int, outer: int, *stack: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of ``lora_a`` and ``lora_b``."""
    return (*stack, inner, R), (*stack, R, outer)


def tokens() -> jax.Array:
    """Ids (8, 4) below 11, no two rows the same."""
    return (jnp.arange(8)[:, None] * 3 + jnp.arange(4)[None] ** 2) % 11


def features() -> jax.Array:
    """Activations (8, 4, 8)."""
    return jax.random.normal(jax.random.key(2), (8, 4, 8))


def linen_row(model: nn.Module, args: tuple[Any, ...], shapes: Any, tolerance: float = 1e-4, **spec: Any) -> Row:
    """The row of a Linen model with random parameters."""
    params = nn.meta.unbox(random_params(model, *args))
    spec = {"rank": R, "alpha": 3, **spec}
    batched = tuple(range(len(args)))
    return Row(model, base_of(model), params, args, LoraSpec(**spec), shapes, tolerance=tolerance, batched=batched)


def base_of(model: nn.Module) -> Any:
    """``model`` as a function of its parameters."""
    return lambda params, *args: model.apply({"params": params}, *args)


VIT_TARGETS = ["query", "value", "out", "Dense_0", "embedding"]
ATTENTION, MAP = "MultiHeadDotProductAttention_0", "MAPHead_0"
VIT_TOP = {
    "embedding": pair(12, 8),
    **{f"{MAP}.{ATTENTION}.{name}": pair(8, 8) for name in ("query", "value", "out")},
    f"{MAP}.mlp.Dense_0": pair(8, 12),
}


def vit_block(block: str, *stack: int) -> dict[str, Any]:
    """The pairs of one block of the vision transformer, or of a stack of them."""
    attention = {f"Transformer.{block}.{ATTENTION}.{name}": pair(8, 8, *stack) for name in ("query", "value", "out")}
    return {**attention, f"Transformer.{block}.mlp.Dense_0": pair(8, 12, *stack)}


@cache
def vit(scan: bool = True) -> Row:
    shapes = dict(VIT_TOP)
    for block, *stack in [("encoderblock", 3)] if scan else [(f"encoderblock_{i}",) for i in range(3)]:
        shapes |= vit_block(block, *stack)
    return linen_row(ViT(scan), (image(),), shapes, target_modules=VIT_TARGETS)


@cache
def vit_function() -> Row:
    """The vision transformer as a function: read by tracing, although its modules are Flax's own."""
    row = vit()
    return Row(row.base, row.base, row.params, row.args, row.spec, row.shapes, tolerance=row.tolerance)


@cache
def unet() -> Row:
    shapes = {
        "conv_in": pair(27, 4),
        "downsample": pair(72, 8),
        "upsample": pair(128, 4),
        "linear_1": pair(4, 6),
        "mid.to_q": pair(8, 8),
        "mid.to_out_0": pair(8, 8),
    }
    for block, inner, outer in (("down", 4, 8), ("up", 8, 4)):
        shapes |= {f"{block}.conv1": pair(9 * inner, outer), f"{block}.conv2": pair(9 * outer, outer)}
        shapes |= {f"{block}.conv_shortcut": pair(inner, outer), f"{block}.time_emb_proj": pair(6, outer)}
    targets = sorted({name.rsplit(".", 1)[-1] for name in shapes})
    return linen_row(UNet(), (image(), jnp.arange(8.0)), shapes, target_modules=targets)


@cache
def unet_function() -> Row:
    """The U-Net as a function."""
    row = unet()
    return Row(row.base, row.base, row.params, row.args, row.spec, row.shapes, tolerance=row.tolerance, batched=(0, 1))


def t5_layer(layer: str, *stack: int) -> dict[str, Any]:
    """The pairs of one layer of T5, or of a stack of them."""
    blocks = ["attention", "encoder_decoder_attention"] if layer.startswith("decoder") else ["attention"]
    shapes = {f"{layer}.{block}.{name}": pair(8, 6, *stack) for block in blocks for name in ("query", "value")}
    shapes |= {f"{layer}.{block}.out": pair(6, 8, *stack) for block in blocks}
    shapes |= {f"{layer}.mlp.wi_0": pair(8, 10, *stack), f"{layer}.mlp.wo": pair(10, 8, *stack)}
    return shapes | {f"{layer}.relpos_bias.rel_embedding": pair(4, 2, *stack)}


@cache
def t5(scan: bool = True, flat: bool = True) -> Row:
    shapes = {"token_embedding": pair(11, 8)}
    for side in ("encoder", "decoder"):
        for layer, *stack in [(side, 2)] if scan else [(f"{side}_{i}",) for i in range(2)]:
            shapes |= t5_layer(layer, *stack)
    targets = ["query", "value", "out", "wi_0", "wo", "rel_embedding", "token_embedding"]
    return linen_row(T5(scan, flat), (tokens(), tokens()[::-1]), shapes, target_modules=targets)


def gemma_layer(layer: str, *stack: int) -> dict[str, Any]:
    """The pairs of one layer of Gemma, or of a stack of them."""
    return {
        f"{layer}.attn.q_einsum": pair(8, 12, *stack),
        f"{layer}.attn.kv_einsum": pair(8, 12, *stack),
        f"{layer}.attn.attn_vec_einsum": pair(12, 8, *stack),
        f"{layer}.mlp.gating_einsum": pair(8, 10, *stack, 2),
        f"{layer}.mlp.linear": pair(10, 8, *stack),
    }


GEMMA_TARGETS = ["q_einsum", "kv_einsum", "attn_vec_einsum", "gating_einsum", "linear", "input_embedding"]


@cache
def gemma(scan: bool = True) -> Row:
    shapes = {"embedder.input_embedding": pair(11, 8)}
    for layer, *stack in [("layers", 2)] if scan else [("layer_0",), ("layer_1",)]:
        shapes |= gemma_layer(layer, *stack)
    return linen_row(Gemma(scan), (tokens(),), shapes, target_modules=GEMMA_TARGETS)


@cache
def gemma_all_linear() -> Row:
    """``all-linear`` is every product, and not the embedding, although it is the head."""
    return linen_row(Gemma(), (tokens(),), gemma_layer("layers", 2), target_modules="all-linear")


@cache
def vmap_experts() -> Row:
    shapes = {"router": pair(8, 3), "moe.experts.wi": pair(8, 10, 3), "moe.experts.wo": pair(10, 8, 3)}
    return linen_row(SlotMixture(VmapExperts), (features(),), shapes, target_modules=["router", "wi", "wo"])


@cache
def einsum_experts() -> Row:
    shapes = {"moe.wi": pair(8, 10, 3), "moe.wo": pair(10, 8, 3)}
    return linen_row(SlotMixture(EinsumExperts), (features(),), shapes, target_modules=["wi", "wo"])


@cache
def ragged_experts() -> Row:
    shapes = {"router": pair(8, 3), "gate_up_proj": pair(8, 10, 3), "down_proj": pair(5, 8, 3)}
    return linen_row(RaggedMixture(), (features(),), shapes, target_modules=["router", "gate_up_proj", "down_proj"])


@cache
def dense_experts(stacked: bool = False) -> Row:
    """Free or contracted expert axes: one pair for all experts, or one for each where the spec says so."""
    shapes = {"gate_up": pair(8, 30), "down": pair(15, 8)}
    if stacked:
        shapes = {"gate_up": pair(8, 10, 3), "down": pair(5, 8, 3)}
    more = {"stacked": ["gate_up", "down"]} if stacked else {}
    return linen_row(DenseMixture(), (features(),), shapes, target_modules=["gate_up", "down"], **more)


def split_stack(tree: Any, stack: str, layer: str, length: int, axis: int = 0) -> Any:
    """``tree`` with the leaves under ``stack`` (a dotted path) cut along ``axis`` into ``layer_0``, ``layer_1``, ..."""
    head, _, rest = stack.partition(".")
    others = {name: node for name, node in tree.items() if name != head}
    if rest:
        return {**others, head: split_stack(tree[head], rest, layer, length, axis)}
    layers = {f"{layer}_{i}": jax.tree.map(lambda x, i=i: jnp.take(x, i, axis), tree[head]) for i in range(length)}
    return {**others, **layers}
