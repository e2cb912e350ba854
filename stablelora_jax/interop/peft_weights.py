"""``adapter_model.safetensors`` of a PEFT adapter: read, check against a layout, and assemble into an adapter tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.interop.peft_entry import Entry
from stablelora_jax.interop.peft_tuners import SHARED_NAMES
from stablelora_jax.lora.peft_config import CONFIG
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError, brief

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
WHOLE = "base_model."  # of tensors of the whole model


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors by name, without the prefix and the adapter name ``default``, in their stored dtypes.

    Raises:
      InputError: no such file, a damaged one, or a tensor that is not floating or has another prefix.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise InputError(f"{path} does not exist (pickled adapter_model.bin files are never read)")
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {brief(error)}") from None
    tensors = {}
    for name, array in loaded.items():
        whole = name.removeprefix(WHOLE) in SHARED_NAMES
        if not whole and not name.startswith(PREFIX):
            raise InputError(f"{path}: tensor {name} is not {PREFIX}<module>.lora_A.weight or the like")
        if not jnp.issubdtype(array.dtype, jnp.floating) and not name.endswith(".shira_indices"):
            raise InputError(f"{path}: tensor {name} is of type {array.dtype}, not floating")
        own = name.removeprefix(WHOLE if whole else PREFIX)
        tensors[own.replace(".default.", ".").removesuffix(".default")] = array
    return {name: array for name, array in tensors.items() if not _copy(name, tensors)}


def _copy(name: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether ``name`` is a copy, which PEFT adds where both ``bias`` and ``modules_to_save`` are set."""
    if ".original_module." in name:
        return True
    plain = name.replace(".modules_to_save.", ".")
    return plain != name and plain in tensors and np.array_equal(tensors[plain], tensors[name])


def stored_name(name: str) -> str:
    """The name in a file of what :func:`read_weights` calls ``name``."""
    return (WHOLE if name in SHARED_NAMES else PREFIX) + name


def check_tensors(
    entries: Sequence[Entry], tensors: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], source: str
) -> None:
    """Check that ``tensors`` are those of ``entries``, and beside them only weights of the base, unchanged.

    Args:
      entries: the layout that config and model give.
      tensors: of the file, by name.
      base: the base's own weights that the file may hold, by name.
      source: the file, for messages.

    Raises:
      InputError: a tensor that is missing, unexpected, of another shape or not finite, or weights of another base.
    """
    expected = {entry.name: entry.shape for entry in entries}
    missing, extra = set(expected) - set(tensors), set(tensors) - set(expected) - set(base)
    for problem, names in (("lacks", missing), ("holds", extra)):
        if names:
            raise InputError(f"{source} {problem} {sorted(names)[0]} ({len(names)} in all), contrary to its {CONFIG}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(f"{source}: {name} has shape {tensors[name].shape}; {CONFIG} and the model say {shape}")
        if not np.isfinite(_wide(tensors[name])).all():
            raise InputError(f"{source}: {name} holds NaN or infinity")
    for name in set(base) & set(tensors) - set(expected):
        if not _same(tensors[name], base[name]):
            raise InputError(
                f"{source}: {name} differs from the base that was given: the adapter belongs to another base"
            )


def assemble(entries: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The adapter tree, float32 (float64 if a tensor is).

    Raises:
      InputError: two different tensors for one part of a leaf (a tied head).
    """
    leaves: dict[tree.Path, np.ndarray] = {}
    written: dict[tuple[tree.Path, str], str] = {}
    tensors = {entry.name: _wide(tensors[entry.name]) for entry in entries}
    dtype = np.result_type(np.float32, *(x for x in tensors.values() if x.dtype.kind == "f"))
    for entry in entries:
        own = tensors[entry.name].dtype
        leaf = leaves.setdefault(entry.path, np.zeros(entry.leaf_shape, own if own.kind == "i" else dtype))
        twin = written.setdefault((entry.path, str(entry.slices)), entry.name)
        if twin == entry.name:
            entry.put(leaf, tensors[entry.name])
        elif not np.array_equal(entry.take(leaf), tensors[entry.name]):
            raise InputError(f"{entry.name} differs from {twin}, though ensure_weight_tying says they are one")
    adapters: dict[str, Any] = {}
    for path, leaf in leaves.items():
        adapters = tree.set_in(adapters, path, jnp.asarray(leaf))
    return adapters


def _same(stored: np.ndarray, own: np.ndarray) -> bool:
    """Whether two arrays are equal when both are rounded to the narrower of their dtypes."""
    narrow = min(stored.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return stored.shape == own.shape and np.array_equal(stored.astype(narrow), own.astype(narrow))


def _wide(array: np.ndarray) -> np.ndarray:
    """``array`` in float32, or in float64 if it is that and JAX has 64-bit types enabled; integers as they are."""
    if array.dtype.kind == "i":
        return array
    wide = np.float64 if jax.dtypes.canonicalize_dtype(array.dtype) == np.float64 else np.float32
    with np.errstate(over="ignore"):  # overflow is found by the check for finite values
        return array.astype(wide)
