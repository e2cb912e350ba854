"""Hugging Face tensors <-> Flax parameters, by one rule instead of a table.

The parameter tree carries Hugging Face's module names, so a leaf's path *is* its tensor name: ``kernel`` (in, out) is
``weight`` (out, in) transposed; ``embedding`` and ``scale`` are ``weight``; ``bias`` is ``bias``; a leaf under the
scanned ``layers`` stacks the tensors ``layers.0 .. layers.L-1`` on its leading axis. Tensors are read one by one into
their place, in their final dtype; a missing, extra or mis-shaped tensor is an error that names it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from stablelora_jax.models.pretrained.tensors import TensorSource
from stablelora_jax.quantization import dequantize_tree, encode, is_linear
from stablelora_jax.utils.errors import InputError, named

LEAF = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
STACK = "layers"
PART = 2**22  # numbers that are looked at together
ShardingRule = Callable[[tuple[str, ...], tuple[int, ...]], Sharding]


def load_params(
    abstract: Any,
    source: TensorSource,
    dtype: DTypeLike,
    sharding: Sharding | ShardingRule | None = None,
    quantize: str | None = None,
) -> Any:
    """Fill the tree ``abstract`` (of ``jax.ShapeDtypeStruct``) from ``source``, every leaf in ``dtype``.

    ``sharding`` is that of every leaf, or gives that of a leaf from its path and shape; None: the default device. The
    host holds one leaf, and one tensor of the file, beside those that are placed. With ``quantize``, the kernels of the
    stacked layers are quantised from the file's own numbers, layer by layer, and their arrays are placed under the
    paths ``(..., "kernel", name of the array)``.

    Raises:
      InputError: naming tensors that are missing, left over, of another shape, not floating-point, or not finite.
    """
    leaves = traverse_util.flatten_dict(abstract)
    wanted = {name: shape for path, leaf in leaves.items() for name, shape in hf_tensors(path, leaf.shape)}
    _check_names(wanted, source, tied="lm_head.weight" not in wanted)
    rule = sharding if callable(sharding) else lambda path, shape: sharding
    params = {path: _load_leaf(path, leaf.shape, source, dtype, rule, quantize) for path, leaf in leaves.items()}
    _check_tied_head(wanted, source)
    return traverse_util.unflatten_dict(params)


def hf_tensors(path: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in Hugging Face's layout, of the tensors of one leaf, in stack order."""
    stacked = STACK in path
    own = shape[1:] if stacked else shape
    own = own[::-1] if path[-1] == "kernel" else own
    name = ".".join((*path[:-1], LEAF[path[-1]]))
    if not stacked:
        return [(name, own)]
    return [(name.replace(f"{STACK}.", f"{STACK}.{i}.", 1), own) for i in range(shape[0])]


def hf_arrays(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of :func:`load_params`: every tensor of ``params`` under its Hugging Face name and layout.

    Quantised kernels are dequantised, one layer at a time.
    """
    for path, leaf in traverse_util.flatten_dict(params).items():
        host, layers = jax.tree.map(np.asarray, leaf), range(leaf.shape[0]) if STACK in path else [...]
        for (name, _), layer in zip(hf_tensors(path, leaf.shape), layers, strict=True):
            part = np.asarray(dequantize_tree(jax.tree.map(operator.itemgetter(layer), host)))
            yield name, np.ascontiguousarray(part.T if path[-1] == "kernel" else part)


def _load_leaf(
    path: tuple[str, ...],
    shape: tuple[int, ...],
    source: TensorSource,
    dtype: DTypeLike,
    rule: Callable[[tuple[str, ...], tuple[int, ...]], Sharding | None],
    quantize: str | None,
) -> Any:
    if quantize is None or not is_linear(path):
        return _place(path, _read_leaf(path, shape, source, dtype), rule(path, shape))

    def place(at: Any, array: np.ndarray) -> jax.Array:
        own = (*path, str(at[0].name))
        return _place(own, array, rule(own, array.shape))

    return jax.tree_util.tree_map_with_path(place, _read_quantized(path, shape, source, dtype, quantize))


def _read_quantized(
    path: tuple[str, ...], shape: tuple[int, ...], source: TensorSource, dtype: DTypeLike, kind: str
) -> Any:
    """The leaf at ``path`` of NumPy arrays: the device quantises one tensor after another."""
    layers = []
    for name, _ in hf_tensors(path, shape):
        if source.quantized is not None:
            layers.append(source.quantized(name, dtype))
            continue
        tensor = _read_floats(source, name)
        if not _finite(tensor):
            raise InputError(f"{source.origin}: tensor {name} holds NaN or infinite numbers")
        layers.append(jax.device_get(encode(tensor, kind, jnp.dtype(dtype))))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)


def _read_floats(source: TensorSource, name: str) -> np.ndarray:
    tensor = source.read(name)
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{source.origin}: tensor {name} holds {tensor.dtype}, not floating-point numbers")
    return tensor


def _read_leaf(path: tuple[str, ...], shape: tuple[int, ...], source: TensorSource, dtype: DTypeLike) -> np.ndarray:
    out = _aligned(shape, jnp.dtype(dtype))
    slots = out if STACK in path else out[None]
    for (name, _), slot in zip(hf_tensors(path, shape), slots, strict=True):
        tensor = _read_floats(source, name)
        with np.errstate(over="ignore"):  # which the check below finds
            slot[...] = tensor.T if path[-1] == "kernel" else tensor
        if not _finite(slot):
            raise InputError(f"{source.origin}: tensor {name} holds NaN or infinite numbers in {out.dtype}")
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes over as it is, without a copy: it asks for multiples of 64 bytes."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _place(path: tuple[str, ...], array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    try:
        if sharding is None:
            placed: jax.Array = jax.device_put(array)
        else:
            placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        return placed.block_until_ready()
    except ValueError as error:
        raise InputError(f"{'.'.join(path)} of shape {array.shape} cannot be laid out: {named(error)}") from None


def _finite(array: np.ndarray) -> bool:
    """Whether all numbers of the contiguous ``array`` are finite, a few million at a time (about 1 GB a second)."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[i : i + PART]).all() for i in range(0, flat.size, PART))


def _check_tied_head(wanted: Mapping[str, Any], source: TensorSource) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head not in source.shapes or head in wanted:
        return
    read = source.rows or (lambda name, rows: source.read(name)[rows])
    count, width = source.shapes[embedding]
    step = max(1, PART // width) if source.rows else count
    parts = (slice(i, min(i + step, count)) for i in range(0, count, step))
    if source.shapes[head] != (count, width) or not all(
        np.array_equal(read(head, p), read(embedding, p)) for p in parts
    ):
        raise InputError(
            f"{source.origin}: {head} differs from {embedding}, but tie_word_embeddings is true: set it false"
        )


def _check_names(wanted: Mapping[str, tuple[int, ...]], source: TensorSource, tied: bool) -> None:
    missing = sorted(set(wanted) - set(source.shapes))
    extra = [n for n in sorted(set(source.shapes) - set(wanted)) if not re.search(r"rotary_emb\.inv_freq$", n)]
    extra = [n for n in extra if not (tied and n == "lm_head.weight")]
    for problem, names in (("lacks", missing), ("holds unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{source.origin} {problem} tensors: {', '.join(names[:3])}{more}, by its configuration")
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise InputError(
                f"{source.origin}: tensor {name} has shape {source.shapes[name]}, its configuration says {shape}"
            )
