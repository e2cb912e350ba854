"""Parameters to safetensors files as the hub has them: one ``model.safetensors``, or shards and their index.

Each file is written whole or not at all, and only one is in memory at a time.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from stablelora_jax.files import write_whole
from stablelora_jax.models.weights import hf_arrays, hf_tensors

INDEX = "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_safetensors(directory: Path, params: Any, dtype: DTypeLike | None, max_shard_size: int) -> None:
    """Write ``params`` into ``directory`` in ``dtype`` (None: each leaf's own), and remove weights it held before.

    A shard holds at most ``max_shard_size`` bytes, or one tensor.
    """
    from safetensors.numpy import save_file

    plan = _plan(params, dtype, max_shard_size)
    total, arrays = sum(size for group in plan for size in group.values()), hf_arrays(params)
    where: dict[str, str] = {}
    for number, group in enumerate(plan, 1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        where |= dict.fromkeys(group, file)
        tensors = {name: _cast(array, dtype) for name, array in itertools.islice(arrays, len(group))}
        partial = directory / f".{file}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, directory / file)
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_whole(directory / INDEX, json.dumps(index, indent=2) + "\n")
    kept = {*where.values(), *([INDEX] if len(plan) > 1 else [])}
    for old in directory.iterdir():
        if OURS.fullmatch(old.name) and old.name not in kept:
            old.unlink()


def _plan(params: Any, dtype: DTypeLike | None, most: int) -> list[dict[str, int]]:
    """The tensors of each shard, in the order of ``hf_arrays``, with their sizes in bytes."""
    plan: list[dict[str, int]] = [{}]
    for path, leaf in traverse_util.flatten_dict(params).items():
        for name, shape in hf_tensors(path, leaf.shape):
            size = int(np.prod(shape)) * jnp.dtype(dtype or leaf.dtype).itemsize
            if plan[-1] and sum(plan[-1].values()) + size > most:
                plan.append({})
            plan[-1][name] = size
    return plan


def _cast(array: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    return array if dtype is None else array.astype(jnp.dtype(dtype), copy=False)
