"""Rows of Equinox's layers; skipped where Equinox is not installed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import LoraSpec
from tests.lora.foreign.laws import Row

R = 2
NAMES = ("linear", "mlp", "table", "attention", "stacked")


def pair(size, out, *stack):
    """The shapes of a pair."""
    return (*stack, size, R), (*stack, R, out)


def x(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=(8, *shape)), jnp.float32)


def row(name):
    """The row of one model: Equinox's kernels are (out, in), and inputs have no batch axis until ``vmap``."""
    eqx = pytest.importorskip("equinox")
    key, batched = jax.random.key(0), jax.vmap

    class Linear(eqx.Module):
        fc: eqx.nn.Linear

        def __call__(self, x):
            return batched(self.fc)(x)

    class Table(eqx.Module):
        table: eqx.nn.Embedding

        def __call__(self, tokens):
            return batched(batched(self.table))(tokens)

    class Attention(eqx.Module):
        attn: eqx.nn.MultiheadAttention

        def __call__(self, x):
            return batched(lambda x: self.attn(x, x, x))(x)

    class Stacked(eqx.Module):
        """Layers stacked by ``filter_vmap`` and run by a scan over the arrays, as Equinox's manual has it."""

        layers: eqx.nn.Linear

        def __init__(self):
            self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))(jax.random.split(key, 3))

        def __call__(self, x):
            arrays, static = eqx.partition(self.layers, eqx.is_array)
            step = lambda x, arrays: (jnp.tanh(batched(eqx.combine(arrays, static))(x)), None)
            return jax.lax.scan(step, x, arrays)[0]

    class Mlp(eqx.Module):
        mlp: eqx.nn.MLP

        def __call__(self, x):
            return batched(self.mlp)(x)

    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, (8, 5)), jnp.int32)
    projections = ("query_proj", "key_proj", "value_proj", "output_proj")
    make = {
        "linear": lambda: (Linear(eqx.nn.Linear(6, 4, key=key)), x(6), {"fc": pair(6, 4)}),
        "mlp": lambda: (
            Mlp(eqx.nn.MLP(6, 4, 8, 2, key=key)),
            x(6),
            {f"mlp.layers.{i}": pair(*size) for i, size in enumerate([(6, 8), (8, 8), (8, 4)])},
        ),
        "table": lambda: (Table(eqx.nn.Embedding(11, 6, key=key)), tokens, {"table": pair(11, 6)}),
        "attention": lambda: (
            Attention(eqx.nn.MultiheadAttention(2, 8, key=key)),
            x(5, 8),
            {f"attn.{name}": pair(8, 8) for name in projections},
        ),
        "stacked": lambda: (Stacked(), x(6), {"layers": pair(6, 6, 3)}),
    }
    model, inputs, shapes = make[name]()
    params, static = eqx.partition(model, eqx.is_array)
    fn = lambda params, x: eqx.combine(params, static)(x)
    targets = ["table"] if name == "table" else "all-linear"
    return Row(fn, fn, params, (inputs,), LoraSpec(target_modules=targets, rank=R, alpha=3), shapes)
