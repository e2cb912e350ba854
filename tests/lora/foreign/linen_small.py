"""Small Linen models, each with one thing that public models do with their parameters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.lora.foreign.linen_language import NORMAL, GemmaBlock


class Recurrent(nn.Module):
    """An LSTM over tokens: the parameters are constants of the scan."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.RNN(nn.LSTMCell(6), name="rnn")(x))


class Inner(nn.Module):
    """The body of the inner scan."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="fc")(nn.tanh(x)), None


class Outer(nn.Module):
    """The body of the outer scan: a scan of its own, with remat."""

    @nn.compact
    def __call__(self, x, _):
        inner = nn.scan(nn.remat(Inner), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return inner(name="layers")(x, None)[0], None


class Stages(nn.Module):
    """A scan of scans, as pipelines have it: kernels (stages, layers, in, out)."""

    @nn.compact
    def __call__(self, x):
        outer = nn.scan(Outer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return outer(name="stages")(x, None)[0]


class InnerAxis(nn.Module):
    """Gemma's blocks, scanned with the layers' axis second: bare leaves are (2, L, D, F)."""

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(GemmaBlock, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return blocks(name="layers")(x)[0]


class Normed(nn.Module):
    """Batch statistics, dropout, a method beside ``__call__``, and a value that is sown."""

    def setup(self):
        self.conv = nn.Conv(6, (3,), padding="CIRCULAR", kernel_dilation=2)
        self.norm = nn.BatchNorm(momentum=0.5)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Dense(5)

    def features(self, x, train=False):
        return nn.relu(self.norm(self.conv(x), use_running_average=not train))

    def __call__(self, x, train=False):
        h = self.features(x, train)
        self.sow("intermediates", "features", h)
        return self.out(self.drop(h, deterministic=not train))


class Cached(nn.Module):
    """A running sum in a collection of its own, as a decoder's cache; the kernel by ``self.param`` in bfloat16."""

    @nn.compact
    def __call__(self, x):
        total = self.variable("cache", "total", jnp.zeros, (x.shape[0], 6), jnp.float32)
        kernel = self.param("kernel", NORMAL, (x.shape[-1], 6)).astype(jnp.bfloat16)
        y = jnp.einsum("bd,df->bf", x.astype(jnp.bfloat16), kernel, preferred_element_type=jnp.float32)
        total.value = total.value + y
        return total.value


class Branches(nn.Module):
    """A kernel that is read in both branches of a condition, and one in a loop."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", NORMAL, (x.shape[-1], x.shape[-1]))
        loop = self.param("loop", NORMAL, (x.shape[-1], x.shape[-1]))
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ kernel, lambda x: -(x @ kernel), x)
        return jax.lax.fori_loop(0, 3, lambda i, x: x + jnp.tanh(x @ loop), x)
