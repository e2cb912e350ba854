"""Rows of NNX models: its own modules, its transforms, and whole models of the structure of public ones."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx

from stablelora_jax import LoraSpec
from tests.lora.foreign.laws import Row
from tests.lora.foreign.nnx_models import Gemma3, Llama, Noisy, Qwen3, Scanned, Unrolled

R = 2
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (8, 5)), jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4, 4, 3)), jnp.float32)


def pair(size, out, *stack):
    """The shapes of a pair."""
    return (*stack, size, R), (*stack, R, out)


def row(model, args, shapes, targets="all-linear", tolerance=1e-5, **spec):
    """The row of an NNX model: its parameters are ``nnx.state(model, nnx.Param)``, the rest stays with it."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    base = lambda params, *args: nnx.merge(graphdef, params, rest, copy=True)(*args)
    spec = LoraSpec(target_modules=targets, rank=R, alpha=3, **spec)
    return Row(model, base, params, args, spec, shapes, tolerance=tolerance)


class Holder(nnx.Module):
    """A module with a name, called ``inner``, and a function of it and the input."""

    def __init__(self, inner, call=lambda inner, *args: inner(*args)):
        self.inner, self.call = inner, call

    def __call__(self, *args):
        return self.call(self.inner, *args)


def x(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=(8, *shape)), jnp.float32)


def small(inner, args, shapes, **kwargs):
    """The row of one module of NNX."""
    call = {"call": kwargs.pop("call")} if "call" in kwargs else {}
    return lambda: row(Holder(inner(nnx.Rngs(0)), **call), args, {"inner": shapes}, ["inner"], **kwargs)


def heads(size=8):
    return {f"inner.{name}": pair(size, size) for name in ("query", "key", "value", "out")}


def attention():
    inner = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    return row(Holder(inner), (x(5, 8),), heads())


def attend(inner, tokens):
    return inner.attend(jnp.tanh(inner(tokens)))


def transformed(name):
    """A module or a transform of NNX around ``nnx.Linear``."""
    call, parts, shapes = TRANSFORMED[name]
    return row(Holder(nnx.Dict(parts()), call), (x(5, 6),), {f"inner.{key}": size for key, size in shapes.items()})


def linear(seed=0):
    return nnx.Linear(6, 6, rngs=nnx.Rngs(seed))


def members():
    return nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs), in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))


def scan(inner, x):
    step = lambda m, x: jnp.tanh(m(x))
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    return nnx.scan(step, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(inner["a"], x)


BRANCHES = (lambda m, x: m["a"](x), lambda m, x: jnp.tanh(m["b"](x)))
BOTH = {"a": pair(6, 6), "b": pair(6, 6)}
TRANSFORMED = {  # name -> (call, modules, shapes)
    "shared": (lambda m, x: m["b"](m["a"](x)), lambda: dict.fromkeys("ab", linear()), {"a": pair(6, 6)}),
    "sequential": (
        lambda m, x: m["a"](x),
        lambda: {"a": nnx.Sequential(linear(), jnp.tanh, linear(1))},
        {"a.layers.0": pair(6, 6), "a.layers.2": pair(6, 6)},
    ),
    "gru": (
        lambda m, x: m["a"](x),
        lambda: {"a": nnx.RNN(nnx.GRUCell(6, 4, rngs=nnx.Rngs(0)))},
        {"a.cell.dense_i": pair(6, 12), "a.cell.dense_h": pair(4, 12)},
    ),
    "cond": (lambda m, x: nnx.cond(x.sum() > 0, *BRANCHES, m, x), lambda: {"a": linear(), "b": linear(1)}, BOTH),
    "switch": (lambda m, x: nnx.switch(1, BRANCHES, m, x), lambda: {"a": linear(), "b": linear(1)}, BOTH),
    "fori_loop": (
        lambda m, x: nnx.fori_loop(0, 3, lambda i, c: (c[0], jnp.tanh(c[0](c[1]))), (m["a"], x))[1],
        lambda: {"a": linear()},
        {"a": pair(6, 6)},
    ),
    "gradient": (
        lambda m, x: nnx.grad(lambda m, x: jnp.tanh(m["a"](x)).sum(), argnums=1)(m, x),
        lambda: {"a": linear()},
        {"a": pair(6, 6)},
    ),
    "scan": (scan, lambda: {"a": members()}, {"a": pair(6, 6, 3)}),
    "remat": (lambda m, x: nnx.remat(lambda m, x: m(x))(m["a"], x), lambda: {"a": linear()}, {"a": pair(6, 6)}),
    "jit": (lambda m, x: nnx.jit(lambda m, x: m(x))(m["a"], x), lambda: {"a": linear()}, {"a": pair(6, 6)}),
}

SMALL = {
    "linear": small(lambda r: nnx.Linear(6, 4, rngs=r), (x(5, 6),), pair(6, 4)),
    "linear_general": small(
        lambda r: nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=r), (x(5, 3, 4),), pair(12, 10)
    ),
    "linear_general_batch": small(
        lambda r: nnx.LinearGeneral(4, 5, axis=-1, batch_axis={0: 8}, rngs=r), (x(3, 4),), pair(4, 5, 8)
    ),
    "conv": small(lambda r: nnx.Conv(4, 6, (3, 3), strides=2, rngs=r), (x(6, 6, 4),), pair(36, 6)),
    "conv_dilated": small(lambda r: nnx.Conv(4, 6, (3,), kernel_dilation=2, rngs=r), (x(9, 4),), pair(12, 6)),
    "conv_causal": small(lambda r: nnx.Conv(4, 6, (3,), padding="CAUSAL", rngs=r), (x(7, 4),), pair(12, 6)),
    "conv_transpose": small(lambda r: nnx.ConvTranspose(4, 6, (3,), strides=2, rngs=r), (x(5, 4),), pair(12, 6)),
    "einsum": small(lambda r: nnx.Einsum("btd,dnh->btnh", (6, 2, 4), (2, 4), rngs=r), (x(5, 6),), pair(6, 8)),
    "einsum_joined": small(lambda r: nnx.Einsum("btd,cdk->cbtk", (3, 6, 4), rngs=r), (x(5, 6),), pair(6, 12)),
    "einsum_stacked": small(
        lambda r: nnx.Einsum("btd,cdk->cbtk", (3, 6, 4), rngs=r), (x(5, 6),), pair(6, 4, 3), stacked=("inner",)
    ),
    "embed": small(lambda r: nnx.Embed(23, 6, rngs=r), (TOKENS,), pair(23, 6)),
    "attend": small(lambda r: nnx.Embed(23, 6, rngs=r), (x(5, 6),), pair(6, 23), call=nnx.Embed.attend),
    "embed_and_attend": small(lambda r: nnx.Embed(23, 6, rngs=r), (TOKENS,), pair(23, 6), call=attend),
    "attention": attention,
} | {name: partial(transformed, name) for name in TRANSFORMED}


def decoder_shapes(prefix="layers", stack=(), attn="attn"):
    """Of a layer with the attention and the MLP of Qwen3."""
    sizes = {
        f"{attn}.q_proj": (16, 16),
        f"{attn}.k_proj": (16, 8),
        f"{attn}.v_proj": (16, 8),
        f"{attn}.o_proj": (16, 16),
    }
    sizes |= {"mlp.gate_proj": (16, 24), "mlp.up_proj": (16, 24), "mlp.down_proj": (24, 16)}
    return {f"{prefix}.{name}": pair(*size, *stack) for name, size in sizes.items()}


def qwen3():
    shapes = decoder_shapes("layers.0") | decoder_shapes("layers.1")
    return row(Qwen3(rngs=nnx.Rngs(0)), (TOKENS,), shapes, tolerance=1e-4)


def qwen3_of_some_layers():
    """One layer of the list, and the head and the look-up table by name."""
    shapes = {"layers.1.attn.q_proj": pair(16, 16), "embedder": pair(23, 16), "lm_head": pair(16, 23)}
    targets = ["layers.1.attn.q_proj", "embedder", "lm_head"]
    return row(Qwen3(rngs=nnx.Rngs(0)), (TOKENS,), shapes, targets, tolerance=1e-4)


def gemma3():
    shapes = decoder_shapes("layers.0", attn="self_attn") | decoder_shapes("layers.1", attn="self_attn")
    shapes |= {f"vision_tower.attention.{name}": pair(8, 8) for name in ("query", "key", "value", "out")}
    shapes |= {"vision_tower.patch_embedding": pair(12, 8), "mm_input_projection_weight": pair(8, 16)}
    found = row(Gemma3(rngs=nnx.Rngs(0)), (TOKENS, IMAGES), shapes, tolerance=1e-4)
    return Row(**{**vars(found), "batched": (0, 1)})


def gemma3_tables():
    """Both look-up tables; that of tokens is the head, too, and belongs to a module called ``weight``."""
    shapes = {"embed_tokens.weight": pair(23, 16), "vision_tower.position_embedding": pair(4, 8)}
    targets = ["embed_tokens.weight", "position_embedding"]
    found = row(Gemma3(rngs=nnx.Rngs(0)), (TOKENS, IMAGES), shapes, targets, tolerance=1e-4)
    return Row(**{**vars(found), "batched": (0, 1)})


def llama():
    sizes = {"q_proj": (16, 16), "kv_proj": (16, 16), "o_proj": (16, 16)}
    sizes |= {"mlp.gate_proj": (16, 24), "mlp.up_proj": (16, 24), "mlp.down_proj": (24, 16)}
    shapes = {f"layers.{i}.{name}": pair(*size) for i in range(2) for name, size in sizes.items()}
    return row(Llama(rngs=nnx.Rngs(0)), (TOKENS,), shapes, tolerance=1e-4)


def llama_table():
    """A bare parameter: its pair is at its own path."""
    shapes = {"input_embedding": pair(23, 16)}
    return row(Llama(rngs=nnx.Rngs(0)), (TOKENS,), shapes, ["input_embedding"], tolerance=1e-4)


def scanned():
    return row(Scanned(rngs=nnx.Rngs(0)), (TOKENS,), decoder_shapes(stack=(3,)), tolerance=1e-4)


def unrolled():
    shapes = {name: size for i in range(3) for name, size in decoder_shapes(f"layers.{i}").items()}
    return row(Unrolled(rngs=nnx.Rngs(0)), (TOKENS,), shapes, tolerance=1e-4)


MODELS = {
    f.__name__: f for f in (qwen3, qwen3_of_some_layers, gemma3, gemma3_tables, llama, llama_table, scanned, unrolled)
}
ROWS = SMALL | MODELS


def noisy():
    return row(Noisy(rngs=nnx.Rngs(0)), (x(6),), {"fc": pair(6, 8), "out": pair(8, 4)})


class Two(nnx.Module):
    """Kernels whose axes need no tracing."""

    def __init__(self, *, rngs):
        self.first, self.second = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))
