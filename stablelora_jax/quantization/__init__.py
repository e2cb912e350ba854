"""Quantised frozen kernels: ``int8`` per output channel and ``nf4`` as in QLoRA. One file a format, one line here.

A quantised kernel is a leaf of the parameter tree that has the ``shape`` and ``dtype`` of the kernel it stands for
(:mod:`~stablelora_jax.quantization.leaf`). A format is a module with two functions:

* ``encode(weight, dtype)``: a weight (*stack, out, in), in Hugging Face's layout, to such a leaf;
* ``decode(leaf)``: the leaf to a weight in float32.

Both can be traced. The decoder calls ``dequantize`` for one layer at a time, in the forward and again in the backward
pass. The kernels of the stacked layers are quantised; embeddings, head, norms and biases are not.

Imports: utils.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.quantization import int8, nf4
from stablelora_jax.quantization.leaf import Quantized, is_quantized
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import keys_of

FORMATS: Mapping[str, ModuleType] = {"int8": int8, "nf4": nf4}
KINDS: Mapping[type[Quantized], ModuleType] = {int8.Int8: int8, nf4.NF4: nf4}
Tree = TypeVar("Tree")

__all__ = ["Quantized", "dequantize", "dequantize_tree", "encode", "format_of", "is_linear", "is_quantized", "quantize"]
__all__ += ["quantize_params"]


@partial(jax.jit, static_argnames="kind")
def quantize(kernel: jax.Array, kind: str) -> Quantized:
    """``kernel`` (*stack, in, out), of any float dtype, as ``kind``; the leaf stands for a kernel of that dtype.

    Raises:
      InputError: there is no such kind.
    """
    leaf: Quantized = encode(jnp.swapaxes(kernel, -1, -2), kind, kernel.dtype)
    return leaf


@partial(jax.jit, static_argnames=("kind", "dtype"))
def encode(weight: jax.Array, kind: str, dtype: DTypeLike) -> Quantized:
    """``weight`` (*stack, out, in) as ``kind``; the leaf stands for a kernel of ``dtype``.

    Raises:
      InputError: there is no such kind.
    """
    leaf: Quantized = format_of(kind).encode(weight, dtype)
    return leaf


@partial(jax.jit, static_argnames="dtype")
def dequantize(leaf: Quantized, dtype: DTypeLike | None = None) -> jax.Array:
    """The kernel (*stack, in, out) that ``leaf`` stands for, in ``dtype`` (default: the leaf's own)."""
    weight: jax.Array = KINDS[type(leaf)].decode(leaf)
    return jnp.swapaxes(weight, -1, -2).astype(leaf.dtype if dtype is None else dtype)


def dequantize_tree(tree: Tree) -> Tree:
    """``tree``, or one leaf, with every quantised kernel dequantised."""
    dense: Tree = jax.tree.map(lambda x: dequantize(x) if is_quantized(x) else x, tree, is_leaf=is_quantized)
    return dense


def quantize_params(params: Tree, kind: str) -> Tree:
    """``params``, nested dicts, with the kernels of its stacked layers quantised. It can be traced.

    Raises:
      InputError: there is no such kind.
    """

    def change(path: Sequence[object], leaf: jax.Array | Quantized) -> jax.Array | Quantized:
        return leaf if isinstance(leaf, Quantized) or not is_linear(keys_of(path)) else quantize(leaf, kind)

    quantized: Tree = jax.tree_util.tree_map_with_path(change, params, is_leaf=is_quantized)
    return quantized


def is_linear(path: Sequence[str | int]) -> bool:
    """Whether the leaf at ``path`` is a kernel of the stacked layers."""
    return "layers" in path and path[-1] == "kernel"


def format_of(kind: str) -> ModuleType:
    """The module of a format.

    Raises:
      InputError: there is no such kind.
    """
    if kind not in FORMATS:
        raise InputError(f"quantize must be one of {', '.join(FORMATS)}, not {kind!r}")
    return FORMATS[kind]
