"""Linen models of text with modules of their own, as public ones have them: T5X's and Gemma's structure, tiny."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.partitioning import ScanIn, param_with_axes, remat, scan_with_axes

NORMAL = nn.initializers.normal(0.3)


class DenseGeneral(nn.Module):
    """A linear map over any axes to any features; the kernel is stored 2-D and reshaped, or stored as it is used."""

    features: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    axes: tuple[str, ...] = ("embed", "joined_kv")
    flat: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = (self.features,) if isinstance(self.features, int) else self.features
        axis = tuple(i % x.ndim for i in ((self.axis,) if isinstance(self.axis, int) else self.axis))
        contracted = tuple(x.shape[i] for i in axis)
        shape, axes = (*contracted, *features), self.axes
        if self.flat:
            shape = (int(np.prod(contracted)), int(np.prod(features)))
        else:
            axes = (*axes, *(f"extra_{i}" for i in range(len(shape) - len(axes))))
        kernel = param_with_axes("kernel", NORMAL, shape, jnp.float32, axes=axes)
        kernel = jnp.reshape(jnp.asarray(kernel, self.dtype), (*contracted, *features))
        numbers = ((axis, tuple(range(len(axis)))), ((), ()))
        return jax.lax.dot_general(jnp.asarray(x, self.dtype), kernel, numbers)


class Norm(nn.Module):
    """RMSNorm."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale.reshape(1, 1, -1)


class RelativeBias(nn.Module):
    """Position biases (heads, buckets), looked up by a product with a one-hot array; the parameter is the left side."""

    heads: int = 2
    buckets: int = 4

    @nn.compact
    def __call__(self, length):
        distance = jnp.clip(jnp.arange(length)[None, :] - jnp.arange(length)[:, None], -1, 2) + 1
        bias = param_with_axes("rel_embedding", NORMAL, (self.heads, self.buckets), axes=("heads", "relpos_buckets"))
        one_hot = jnp.asarray(jnp.arange(self.buckets)[:, None, None] == distance[None], jnp.float32)
        return jax.lax.dot_general(bias, one_hot, (((1,), (0,)), ((), ())))[None]


class T5Attention(nn.Module):
    """Projections to heads and from them."""

    flat: bool
    heads: int = 2
    head_dim: int = 3

    @nn.compact
    def __call__(self, x, y, bias=None):
        q, k, v = (
            DenseGeneral((self.heads, self.head_dim), flat=self.flat, name=name)(inputs)
            for name, inputs in (("query", x), ("key", y), ("value", y))
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        logits = logits if bias is None else logits + jnp.broadcast_to(bias, logits.shape)
        x = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v)
        out = DenseGeneral(y.shape[-1], axis=(-2, -1), axes=("joined_kv", "embed"), flat=self.flat, name="out")
        return out(x)


class T5Mlp(nn.Module):
    """A gated MLP whose halves are modules."""

    flat: bool

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(DenseGeneral(10, axes=("embed", "mlp"), flat=self.flat, name="wi_0")(x))
        h = h * DenseGeneral(10, axes=("embed", "mlp"), flat=self.flat, name="wi_1")(x)
        return DenseGeneral(x.shape[-1], axes=("mlp", "embed"), flat=self.flat, name="wo")(h)


class T5Layer(nn.Module):
    """A layer of the encoder, or of the decoder where ``encoded`` is given."""

    flat: bool

    @nn.compact
    def __call__(self, x, encoded=None):
        y = Norm(name="pre_attention_layer_norm")(x)
        bias = RelativeBias(name="relpos_bias")(x.shape[1])
        x = x + T5Attention(self.flat, name="attention")(y, y, bias)
        if encoded is not None:
            y = Norm(name="pre_cross_attention_layer_norm")(x)
            x = x + T5Attention(self.flat, name="encoder_decoder_attention")(y, encoded)
        return x + T5Mlp(self.flat, name="mlp")(Norm(name="pre_mlp_layer_norm")(x)), None


class T5(nn.Module):
    """Encoder and decoder, tied embeddings; the layers unrolled, or scanned with the parameters' axis 1 and remat."""

    scan: bool = True
    flat: bool = True
    depth: int = 2
    width: int = 8
    vocabulary: int = 11

    def stack(self, name, x, *args):
        if not self.scan:
            for i in range(self.depth):
                x, _ = T5Layer(self.flat, name=f"{name}_{i}")(x, *args)
            return x
        axis = 1 if self.is_mutable_collection("params") else ScanIn(1)
        layer = remat(T5Layer, prevent_cse=False, policy=jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims)
        layers = scan_with_axes(
            layer,
            variable_axes={"params": axis},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * len(args),
            length=self.depth,
            axis_name="layers",
        )
        return layers(self.flat, name=name)(x, *args)[0]

    @nn.compact
    def __call__(self, source, target):
        table = param_with_axes("token_embedding", NORMAL, (self.vocabulary, self.width), axes=("vocab", "embed"))
        encoded = Norm(name="encoder_norm")(self.stack("encoder", jnp.asarray(table, jnp.float32)[source]))
        one_hot = jax.nn.one_hot(target, self.vocabulary)
        x = Norm(name="decoder_norm")(self.stack("decoder", jnp.dot(one_hot, table), encoded))
        return jnp.dot(x / jnp.sqrt(self.width), table.T)


class Einsum(nn.Module):
    """A weight of any shape; the expression comes with the call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, expression, x):
        return jnp.einsum(expression, x, self.param("w", NORMAL, self.shape))


class Embedder(nn.Module):
    """The table that is gathered at the start, and transposed at the end."""

    vocabulary: int
    width: int

    def setup(self):
        self.table = self.param("input_embedding", NORMAL, (self.vocabulary, self.width))

    def encode(self, x):
        x = self.table[(x,)]
        return x * jnp.sqrt(self.width).astype(x.dtype)

    def decode(self, x):
        return jnp.dot(x, self.table.T)


class GemmaAttention(nn.Module):
    """Queries (N, D, H), fused keys and values (2, K, D, H), output (N, H, D)."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 3

    @nn.compact
    def __call__(self, x):
        width, length = x.shape[-1], x.shape[1]
        q = Einsum((self.heads, width, self.head_dim), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = Einsum((2, self.kv_heads, width, self.head_dim), name="kv_einsum")("BSD,2KDH->2BSKH", x)
        q = q.reshape(*q.shape[:2], self.kv_heads, -1, self.head_dim)
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k)
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None, None]
        encoded = jnp.einsum("BKGTS,BSKH->BTKGH", nn.softmax(jnp.where(mask, logits, -1e9)), v)
        encoded = encoded.reshape(*x.shape[:2], self.heads, self.head_dim)
        return Einsum((self.heads, self.head_dim, width), name="attn_vec_einsum")("BTNH,NHD->BTD", encoded)


class GemmaMlp(nn.Module):
    """Gate and value in one bare parameter (2, D, F), read by index."""

    @nn.compact
    def __call__(self, x):
        gating = self.param("gating_einsum", NORMAL, (2, x.shape[-1], 10))
        hidden = nn.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1])
        return jnp.dot(hidden, self.param("linear", NORMAL, (10, x.shape[-1])))


class GemmaBlock(nn.Module):
    """A block, as ``nn.scan`` takes it."""

    @nn.compact
    def __call__(self, x):
        x = x + GemmaAttention(name="attn")(Norm(name="pre_attention_norm")(x))
        return x + GemmaMlp(name="mlp")(Norm(name="pre_ffw_norm")(x)), None


class Gemma(nn.Module):
    """A decoder whose layers are scanned with remat or unrolled, and whose embedding is its head."""

    scan: bool = True
    depth: int = 2
    width: int = 8
    vocabulary: int = 11

    @nn.compact
    def __call__(self, tokens):
        embedder = Embedder(self.vocabulary, self.width, name="embedder")
        x = embedder.encode(tokens)
        if self.scan:
            block = nn.remat(GemmaBlock, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
            blocks = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            x, _ = blocks(name="layers")(x)
        else:
            for i in range(self.depth):
                x, _ = GemmaBlock(name=f"layer_{i}")(x)
        return embedder.decode(Norm(name="final_norm")(x))
