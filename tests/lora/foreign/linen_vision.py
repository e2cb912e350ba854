"""Linen models of images with the structure of public ones: a vision transformer and a U-Net, tiny and random."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class EncoderBlock(nn.Module):
    """A pre-norm block of a vision transformer: a carry and no per-layer output, as ``nn.scan`` takes it."""

    heads: int = 2
    mlp_dim: int = 12

    @nn.compact
    def __call__(self, x, deterministic=True):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads, deterministic=deterministic)(y, y)
        y = nn.LayerNorm()(x)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        return x + MlpBlock(self.mlp_dim, name="mlp")(y), None


class MlpBlock(nn.Module):
    """Two Dense with automatic names."""

    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(self.mlp_dim)(x))
        return nn.Dense(width)(x)


class MapHead(nn.Module):
    """Attention pooling with a learned probe."""

    heads: int = 2

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]), x.dtype)
        probe = jnp.tile(probe, [x.shape[0], 1, 1])
        x = nn.MultiHeadDotProductAttention(num_heads=self.heads)(probe, x)
        return (x + MlpBlock(12, name="mlp")(nn.LayerNorm()(x)))[:, 0]


class ViT(nn.Module):
    """Patches by a convolution, an added position embedding, blocks scanned with remat or unrolled, a probe, a head."""

    scan: bool = True
    depth: int = 3
    width: int = 8

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(self.width, (2, 2), strides=(2, 2), padding="VALID", name="embedding")(image)
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, h * w, c), x.dtype)
        x = Encoder(self.scan, self.depth, name="Transformer")(x)
        return nn.Dense(5, name="head")(MapHead(name="MAPHead_0")(x))


class Encoder(nn.Module):
    """The blocks and the last norm."""

    scan: bool
    depth: int

    @nn.compact
    def __call__(self, x):
        block = nn.remat(EncoderBlock, prevent_cse=False, static_argnums=(2,)) if self.scan else EncoderBlock
        if self.scan:
            axes, rngs = {"params": 0}, {"params": True, "dropout": True}
            block = nn.scan(block, variable_axes=axes, split_rngs=rngs, in_axes=nn.broadcast, length=self.depth)
            x, _ = block(name="encoderblock")(x, True)
        else:
            for i in range(self.depth):
                x, _ = block(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class ResnetBlock(nn.Module):
    """GroupNorm, convolutions, a time embedding added, a 1x1 shortcut where the channels change."""

    channels: int

    @nn.compact
    def __call__(self, x, time):
        h = nn.Conv(self.channels, (3, 3), name="conv1")(nn.swish(nn.GroupNorm(2, name="norm1")(x)))
        h = h + nn.Dense(self.channels, name="time_emb_proj")(nn.swish(time))[:, None, None, :]
        h = nn.Conv(self.channels, (3, 3), padding=((1, 1), (1, 1)), name="conv2")(
            nn.swish(nn.GroupNorm(2, name="norm2")(h))
        )
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), padding="VALID", name="conv_shortcut")(x)
        return x + h


class SpatialAttention(nn.Module):
    """Attention over pixels with projections without bias, heads by reshape."""

    heads: int = 2

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        y = nn.GroupNorm(2, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (
            nn.Dense(c, use_bias=False, name=name)(y).reshape(b, h * w, self.heads, -1)
            for name in ("to_q", "to_k", "to_v")
        )
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(c / self.heads))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, h, w, c)
        return x + nn.Dense(c, name="to_out_0")(y)


class UNet(nn.Module):
    """One level down by a strided convolution, attention in the middle, one up by a transposed convolution."""

    channels: int = 4

    @nn.compact
    def __call__(self, x, timesteps):
        frequencies = jnp.exp(-jnp.arange(2.0))[None, :] * timesteps[:, None]
        time = jnp.concatenate([jnp.sin(frequencies), jnp.cos(frequencies)], axis=-1)
        time = nn.Dense(6, name="linear_2")(nn.swish(nn.Dense(6, name="linear_1")(time)))
        x = skip = nn.Conv(self.channels, (3, 3), name="conv_in")(x)
        x = ResnetBlock(2 * self.channels, name="down")(x, time)
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        x = nn.Conv(x.shape[-1], (3, 3), strides=(2, 2), padding="VALID", name="downsample")(x)
        x = SpatialAttention(name="mid")(x)
        x = nn.ConvTranspose(self.channels, (4, 4), strides=(2, 2), name="upsample")(x)
        x = ResnetBlock(self.channels, name="up")(jnp.concatenate([x, skip], axis=-1), time)
        x = nn.Conv(x.shape[-1], (3, 3), feature_group_count=x.shape[-1], name="depthwise")(x)
        return nn.Conv(3, (3, 3), name="conv_out")(nn.swish(nn.GroupNorm(2, name="norm_out")(x)))


def image(size: int = 4, batch: int = 8) -> jax.Array:
    """Random images (batch, size, size, 3)."""
    return jax.random.normal(jax.random.key(1), (batch, size, size, 3))
