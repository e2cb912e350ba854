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

from stablelora_jax.models.pretrained.safetensors import hf_arrays, hf_tensors
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import partial_name, require_replaceable, write_whole

INDEX = "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
MARK = {"format": "pt", "written_by": "stablelora_jax"}  # in the header of every file of ours
MODEL_FILES = (
    ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    + ("chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model")
)  # fmt: skip


def require_own(directory: Path) -> None:
    """Refuse a directory with a model that :func:`write_safetensors` has not written.

    Raises:
      InputError: naming a file that would be replaced or removed.
    """
    there = sorted(path for path in directory.iterdir() if OURS.fullmatch(path.name) or path.name in MODEL_FILES)
    weights = [path for path in there if path.suffix == ".safetensors"]
    for path in there:
        require_replaceable(path)
    foreign = [path for path in weights if not _is_own(path)] or ([] if weights else there)
    if foreign:
        raise InputError(f"{foreign[0]} was not written by stablelora_jax: choose another directory")


def _is_own(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return (file.metadata() or {}).get("written_by") == MARK["written_by"]
    except (SafetensorError, OSError, ValueError):
        return False


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
        partial = partial_name(directory / file)
        try:
            save_file(tensors, partial, metadata=MARK)
            os.replace(partial, directory / file)
        finally:
            partial.unlink(missing_ok=True)
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
