"""Frozen kernels in fewer bits: ``int8`` by output channels and ``nf4`` as in QLoRA. One file a format, one line here.

A quantised kernel is a leaf of the parameter tree that has the ``shape`` and ``dtype`` of the kernel it stands for
(:mod:`~stablelora_jax.quantization.leaf`). A format is a module with two functions:

* ``encode(weight, dtype)``: a weight (*stack, out, in), in Hugging Face's layout, to such a leaf;
* ``decode(leaf)``: the leaf to a weight in float32.

Both can be traced. What a model computes with is ``dequantize``; the decoder calls it for one layer at a time, in the
forward and again in the backward pass. What is quantised are the kernels of the stacked layers: embeddings, head,
norms and biases stay as they are.

Imports: utils.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.quantization import int8, nf4
from stablelora_jax.quantization.leaf import Quantized, is_quantized
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import keys_of

FORMATS = {"int8": int8, "nf4": nf4}
KINDS = {int8.Int8: int8, nf4.NF4: nf4}

__all__ = ["Quantized", "dense", "dequantize", "encode", "format_of", "is_linear", "is_quantized", "quantize"]
__all__ += ["quantize_params"]


@partial(jax.jit, static_argnames="kind")
def quantize(kernel: jax.Array, kind: str) -> Any:
    """``kernel`` (*stack, in, out), of any float dtype, as ``kind``; the leaf stands for a kernel of that dtype.

    Raises:
      InputError: there is no such kind.
    """
    return encode(jnp.swapaxes(kernel, -1, -2), kind, kernel.dtype)


@partial(jax.jit, static_argnames=("kind", "dtype"))
def encode(weight: jax.Array, kind: str, dtype: DTypeLike) -> Any:
    """``weight`` (*stack, out, in) as ``kind``; the leaf stands for a kernel of ``dtype``.

    Raises:
      InputError: there is no such kind.
    """
    return format_of(kind).encode(weight, dtype)


@partial(jax.jit, static_argnames="dtype")
def dequantize(leaf: Any, dtype: DTypeLike | None = None) -> jax.Array:
    """The kernel (*stack, in, out) that ``leaf`` stands for, in ``dtype`` (default: the leaf's own)."""
    weight = KINDS[type(leaf)].decode(leaf)
    return jnp.swapaxes(weight, -1, -2).astype(leaf.dtype if dtype is None else dtype)


def dequantize_tree(tree: Any) -> Any:
    """``tree``, or one leaf, with every quantised kernel dequantised."""
    return jax.tree.map(lambda leaf: dequantize(leaf) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized)


def quantize_params(params: Any, kind: str) -> Any:
    """``params``, nested dicts, with the kernels of its stacked layers quantised. It can be traced for shapes alone.

    Raises:
      InputError: there is no such kind.
    """

    def change(path: Any, leaf: Any) -> Any:
        return quantize(leaf, kind) if is_linear(keys_of(path)) and not is_quantized(leaf) else leaf

    return jax.tree_util.tree_map_with_path(change, params, is_leaf=is_quantized)


def is_linear(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at ``path`` is a kernel of the stacked layers."""
    return "layers" in path and path[-1] == "kernel"


def format_of(kind: str) -> Any:
    """The module of a format.

    Raises:
      InputError: there is no such kind.
    """
    if kind not in FORMATS:
        raise InputError(f"quantize must be one of {', '.join(FORMATS)}, not {kind!r}")
    return FORMATS[kind]
