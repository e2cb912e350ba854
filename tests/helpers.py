"""Small models and adapters that tests are made of."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec
from stablelora_jax.lora.initializers import CALIBRATED
from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.models.architecture import DecoderConfig, Rope
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.utils import tree

TINY = dict(
    model_type="llama",
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


def long(*values):
    """A case of ``parametrize`` that is marked ``long``."""
    return pytest.param(*values, marks=pytest.mark.long)


def soak(*values):
    """A case of ``parametrize`` that is marked ``soak``."""
    return pytest.param(*values, marks=pytest.mark.soak)


def jit(function):
    """``jax.jit`` that compiles in half of the time, where speed does not matter."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def exact_jit(function):
    """:func:`jit` with XLA's present code generator, where rounding matters: conftest sets the older one."""
    options = {"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else {}
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0, **options})


def tiny_decoder(dtype=jnp.float32, **changes):
    """A random decoder of a few thousand parameters, biases and norms random too: ``(model, params)``."""
    model = Decoder(DecoderConfig(**{**TINY, **changes}), dtype=dtype)
    return model, random_params(model, jnp.zeros((1, 2), jnp.int32))


def random_params(model, *inputs):
    """Parameters of ``model`` with every leaf random, so that no bias is zero and no norm is one."""
    shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), *inputs)["params"]
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) / 2 / max(1, s.shape[-1]) ** 0.25, s.dtype), shapes
    )


def tokens(B=2, T=7, vocab=31, seed=0):
    """Random token ids (B, T) int32."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (B, T)), jnp.int32)


def trained(adapters, spec, seed=5, size=0.3):
    """``adapters`` as if trained: both factors random where they are in use, zero where they are padding."""
    rng = np.random.default_rng(seed)
    for path, target in adapter_target_modules(adapters, spec).items():
        pair, mask = tree.get_in(adapters, path), target.mask()
        a = size * rng.normal(size=pair["lora_a"].shape) * mask[..., None, :]
        b = size * rng.normal(size=pair["lora_b"].shape) * mask[..., :, None]
        dtype = pair["lora_a"].dtype
        trained_pair = {"lora_a": jnp.asarray(a, dtype), "lora_b": jnp.asarray(b, dtype)}
        adapters = tree.set_in(adapters, path, {**pair, **trained_pair})
    factors = ("lora_a", "lora_b")
    moved = lambda leaf: leaf * jnp.asarray(1 + size * rng.normal(size=leaf.shape), leaf.dtype)  # keeps zeros zero
    adapters = jax.tree_util.tree_map_with_path(lambda at, x: x if at[-1].key in factors else moved(x), adapters)
    for path, target in adapter_target_modules(adapters, spec).items() if spec.lora_bias else ():
        used = np.array(target.ranks).reshape(*target.stack, 1) > 0
        drawn = jnp.asarray(size * rng.normal(size=(*target.stack, target.size[1])) * used, jnp.float32)
        adapters = tree.set_in(adapters, (*path, "lora_bias"), drawn)
    return adapters


def random_calibration(params, spec, size=0.01):
    """What the initialisation of ``spec`` would have measured, drawn at random; None where it measures nothing."""
    if spec.init not in CALIBRATED:
        return None
    rng, found = np.random.default_rng(3), {}
    for path, target in find_target_modules(params, spec).items():
        drawn = size * rng.normal(size=(*target.stack, *target.size))
        found = tree.set_in(found, path, {CALIBRATED[spec.init]: jnp.asarray(drawn, jnp.float32)})
    return found


def largest_difference(a, b):
    """The greatest |a - b| over two trees, relative to the greatest |b| (at least 1)."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    arrays = ((np.asarray(x), np.asarray(y)) for x, y in pairs)  # NumPy compiles nothing
    return max(float(np.abs(x - y).max() / max(1.0, np.abs(y).max())) for x, y in arrays)


class ForeignMLP(nn.Module):
    """A model that is not ours and has no scan: DenseGeneral in two forms, Dense with and without bias."""

    @nn.compact
    def __call__(self, x):
        h = nn.DenseGeneral((3, 4), name="split")(x)
        h = nn.DenseGeneral(10, axis=(-2, -1), name="join")(nn.tanh(h))
        for i in range(2):
            h = h + nn.Dense(10, use_bias=bool(i), name=f"block_{i}")(nn.tanh(h))
        return nn.Dense(5, name="head")(h)


class ForeignBlock(nn.Module):
    """The body of a foreign scan."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, _):
        dequantize_tree = nn.remat(nn.Dense) if self.remat else nn.Dense
        return x + dequantize_tree(x.shape[-1], name="fc")(nn.tanh(x)), None


class ForeignScan(nn.Module):
    """A model that is not ours, with a scan of its own that lists only ``params``."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        body = nn.scan(ForeignBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = body(self.remat, name="blocks")(x, None)
        return nn.Dense(3, name="out")(x)


class ForeignAttention(nn.Module):
    """Flax's own attention, whose projections are DenseGeneral."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attn")(x, x)


class ForeignConv(nn.Module):
    """Convolution and einsum."""

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Conv(6, (3,), strides=2, name="conv")(x))
        return nn.Einsum((6, 2, 4), "btd,dnh->bthn", name="mix")(h)


class ForeignTied(nn.Module):
    """An embedding that is the head, too."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(9, 6, name="embed")
        h = embed(x)
        return embed.attend(h + nn.Dense(6, name="fc")(nn.tanh(h)))


class ForeignExperts(nn.Module):
    """Parameters stacked by ``nn.vmap`` instead of a scan."""

    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return experts(4, name="experts")(x).sum(0)


FOREIGN = {
    "dense": (ForeignMLP(), (2, 5, 6), LoraSpec(target_modules=["split", "join", "block_0", "block_1"], rank=2)),
    "dense_patterns": (
        ForeignMLP(),
        (2, 5, 6),
        LoraSpec(
            target_modules="all-linear",
            rank=3,
            rank_pattern={"block_1": 1},
            alpha_pattern={"join": 2},
            scaling="rslora",
        ),
    ),
    "scan": (ForeignScan(), (2, 5, 6), LoraSpec(target_modules=["fc", "out"], rank=2, stacked=("blocks",))),
    "scan_remat": (ForeignScan(True), (2, 5, 6), LoraSpec(target_modules=["fc"], rank=2, stacked=("blocks",))),
    "scan_layers": (
        ForeignScan(),
        (2, 5, 6),
        LoraSpec(
            target_modules=["fc"],
            rank=4,
            layers_to_transform=(0, 2, 3),
            rank_pattern={"blocks.2.fc": 1},
            stacked=("blocks",),
        ),
    ),
    "attention": (ForeignAttention(), (2, 5, 6), LoraSpec(target_modules=["query", "value", "out"], rank=2)),
    "conv_einsum": (ForeignConv(), (2, 8, 5), LoraSpec(target_modules=["conv", "mix"], rank=2, in_axes={"mix": (0,)})),
    "experts": (ForeignExperts(), (2, 5), LoraSpec(target_modules=r"experts\.\d", rank=2, stacked=("experts",))),
}
ROPE_LLAMA3 = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 16)
