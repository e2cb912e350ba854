"""Rows of plain functions: products, loops, Haiku's names, Equinox."""

from __future__ import annotations

from functools import partial

from stablelora_jax import LoraSpec
from tests.lora.foreign import equinox_models
from tests.lora.foreign import function_models as models
from tests.lora.foreign.laws import Row
from tests.lora.foreign.product_models import PRODUCTS, X

R = 2


def pair(size, out, *stack):
    """The shapes of a pair."""
    return (*stack, size, R), (*stack, R, out)


def row(built, shapes, targets="all-linear", tolerance=1e-5, batched=(0,), **spec):
    """The row of ``(fn, params, args)``."""
    fn, params, args = built
    spec = LoraSpec(target_modules=targets, rank=R, alpha=3, **spec)
    return Row(fn, fn, params, args, spec, shapes, tolerance=tolerance, batched=batched)


LAYER = {"qkv": (8, 24), "out": (8, 8), "up": (8, 12), "down": (12, 8)}
DECODER = {f"layers.{name}": pair(*size, 3) for name, size in LAYER.items()}


def product(name):
    """One parameter, in one of the ways that people write a product."""
    call, w, rows, columns = PRODUCTS[name]
    shapes = {"w": ((*rows, R), (*columns[:-1], R, columns[-1]))}
    built = (lambda params, x: call(params["w"]["kernel"], x)), {"w": {"kernel": w}}, (X,)
    return row(built, shapes, ["w"], tolerance=2e-2 if name == "rounded" else 1e-5)  # bfloat16


def decoder(name):
    """All the decoder's matrices: whatever the loop, a pair for each layer."""
    return row(models.transformer(models.LOOPS[name]), DECODER, tolerance=1e-4)


def decoder_with_tables():
    """The look-up table and the head, by name; ``embed`` and ``unembed`` are bare leaves."""
    shapes = {"embed": pair(11, 8), "unembed": pair(8, 11), "layers.up": pair(8, 12, 3)}
    return row(models.transformer(models.by_scan), shapes, ["embed", "unembed", "up"], tolerance=1e-4)


def haiku():
    shapes = {"net/~/mlp/~/linear_0": pair(8, 12), "net/~/mlp/~/linear_1": pair(12, 8)}
    return row(models.haiku_like(), shapes)


def haiku_table():
    """Haiku's tables are called ``embeddings``, which is a leaf's own name."""
    return row(models.haiku_like(), {"net/~/embed.embeddings": pair(11, 8)}, ["embeddings"])


def conditional():
    shapes = dict.fromkeys(("shared", "yes", "no"), pair(8, 8))
    return row(models.conditional(), shapes)


def force():
    return row(models.force(), {"a": pair(8, 12), "b": pair(12, 1)}, tolerance=1e-4)


def tied():
    return row(models.tied(), {"table": pair(11, 8), "fc": pair(8, 8)}, ["table", "fc"])


ROWS = {name: partial(product, name) for name in PRODUCTS}
ROWS |= {name: partial(decoder, name) for name in models.LOOPS}
ROWS |= {f.__name__: f for f in (decoder_with_tables, haiku, haiku_table, conditional, force, tied)}
ROWS |= {f"equinox_{name}": partial(equinox_models.row, name) for name in equinox_models.NAMES}
NO_DORA = ("scaled", "in_parts", "ragged")  # refused by name
