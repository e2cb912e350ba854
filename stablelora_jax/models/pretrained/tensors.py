"""Where tensors of a pretrained model come from: by name, one at a time, in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from stablelora_jax.utils.errors import InputError, named


class TensorSource(NamedTuple):
    """Tensors by name, in Hugging Face's layout, read on demand."""

    origin: str  # file or directory, for errors
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    rows: Callable[[str, slice], np.ndarray] | None = None  # a part of one, without reading the rest
    quantized: Callable[[str, DTypeLike], Any] | None = None  # a layer's kernel as the file has it quantised


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
            raise InputError(f"{file} is not a readable safetensors file: {named(error)}") from None
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in where.items()}

    def read(name: str) -> np.ndarray:
        try:
            tensor: np.ndarray = where[name].get_tensor(name)
            return tensor
        except (SafetensorError, TypeError, ValueError, AttributeError) as error:  # numpy has no floats of eight bits
            raise InputError(f"{directory}: tensor {name} cannot be read: {named(error)}") from None

    def read_rows(name: str, rows: slice) -> np.ndarray:
        try:
            tensor: np.ndarray = where[name].get_slice(name)[rows]
            return tensor
        except (SafetensorError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{directory}: tensor {name} cannot be read: {named(error)}") from None

    return TensorSource(str(directory), shapes, read, read_rows)


def _safetensors_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pth")))
        hint = f" (pickled weights such as {pickled[0]} are never read: convert them)" if pickled else ""
        raise InputError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json{hint}")
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise InputError(f"{index} has no readable weight_map: {named(error)}") from None
    for shard in shards:
        if not (isinstance(shard, str) and shard and Path(shard).name == shard):
            raise InputError(f"{index} names the shard {shard!r:.60}, which is not the name of a file beside it")
    there = {file.name for file in directory.iterdir() if file.is_file()}
    absent = [shard for shard in shards if shard not in there]
    if absent:
        raise InputError(f"{directory} lacks the shard {absent[0]:.100} that {index.name} lists")
    return [directory / shard for shard in shards]
