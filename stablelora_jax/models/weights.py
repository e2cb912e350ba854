"""Hugging Face tensors <-> Flax parameters, by one rule instead of a table.

The parameter tree carries Hugging Face's module names, so a leaf's path *is* its tensor name: ``kernel`` (in, out) is
``weight`` (out, in) transposed; ``embedding`` and ``scale`` are ``weight``; ``bias`` is ``bias``; a leaf under the
scanned ``layers`` stacks the tensors ``layers.0 .. layers.L-1`` on its leading axis. Tensors are read one by one into
their place, in their final dtype; a missing, extra or mis-shaped tensor is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from stablelora_jax.errors import InputError

LEAF = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
STACK = "layers"


class TensorSource(NamedTuple):
    """Tensors by name, in Hugging Face's layout, read on demand."""

    origin: str  # file or directory, for errors
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def safetensors_source(directory: Path) -> TensorSource:
    """Open ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

    Raises:
      InputError: no such file (pickled weights are not read), or one that cannot be parsed.
    """
    from safetensors import SafetensorError, safe_open

    where: dict[str, Any] = {}
    for file in _safetensors_files(directory):
        try:
            handle = safe_open(str(file), framework="numpy")
            where |= {name: handle for name in handle.keys()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a readable safetensors file: {_one_line(error)}") from None
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in where.items()}

    def read(name: str) -> np.ndarray:
        try:
            return where[name].get_tensor(name)
        except (SafetensorError, TypeError, ValueError) as error:
            raise InputError(f"{directory}: tensor {name} cannot be read: {_one_line(error)}") from None

    return TensorSource(str(directory), shapes, read)


def load_params(abstract: Any, source: TensorSource, dtype: DTypeLike) -> Any:
    """Fill the tree ``abstract`` (of ``jax.ShapeDtypeStruct``) from ``source``, every leaf in ``dtype``.

    Raises:
      InputError: naming tensors that are missing, left over or of another shape.
    """
    leaves = traverse_util.flatten_dict(abstract)
    wanted = {name: shape for path, leaf in leaves.items() for name, shape in hf_tensors(path, leaf.shape)}
    _check_names(wanted, source, tied="lm_head.weight" not in wanted)
    _check_tied_head(wanted, source)
    params = {path: _read_leaf(path, leaf.shape, source, dtype) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params)


def hf_tensors(path: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in Hugging Face's layout, of the tensors behind one leaf, in stack order."""
    stacked = STACK in path
    own = shape[1:] if stacked else shape
    own = own[::-1] if path[-1] == "kernel" else own
    name = ".".join((*path[:-1], LEAF[path[-1]]))
    if not stacked:
        return [(name, own)]
    return [(name.replace(f"{STACK}.", f"{STACK}.{i}.", 1), own) for i in range(shape[0])]


def hf_arrays(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of :func:`load_params`: every tensor of ``params`` under its Hugging Face name and layout."""
    for path, leaf in traverse_util.flatten_dict(params).items():
        array = np.asarray(leaf)
        slices = array if STACK in path else array[None]
        for (name, _), part in zip(hf_tensors(path, array.shape), slices, strict=True):
            yield name, np.ascontiguousarray(part.T if path[-1] == "kernel" else part)


def _read_leaf(path: tuple[str, ...], shape: tuple[int, ...], source: TensorSource, dtype: DTypeLike) -> jax.Array:
    out = np.empty(shape, jnp.dtype(dtype))
    slots = out if STACK in path else out[None]
    for (name, _), slot in zip(hf_tensors(path, shape), slots, strict=True):
        tensor = source.read(name)
        slot[...] = tensor.T if path[-1] == "kernel" else tensor
    return jnp.asarray(out)


def _check_tied_head(wanted: Mapping[str, Any], source: TensorSource) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head in source.shapes and head not in wanted and not np.array_equal(source.read(head), source.read(embedding)):
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


def _safetensors_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pth")))
        hint = f" (pickled weights such as {pickled[0]} are never read: convert them)" if pickled else ""
        raise InputError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json{hint}")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} has no readable weight_map: {_one_line(error)}") from None
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise InputError(f"{directory} lacks the shard {absent[0]} that {index.name} lists")
    return [directory / shard for shard in shards]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
