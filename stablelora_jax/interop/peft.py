"""Adapters in and out of PEFT's directory format: plain LoRA and rsLoRA, with rank and alpha patterns.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``, with tensors
``base_model.model.<module>.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r): ours transposed, one pair for each
layer. (Measured on PEFT 0.21; the scale and the pattern rules are the same on both sides.) PEFT itself loads a wrong
prefix or half of the layers without an error; here every tensor must be expected and every expected one be there.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from stablelora_jax import tree
from stablelora_jax.adapter import LoraSpec, Site, adapter_sites
from stablelora_jax.errors import InputError
from stablelora_jax.files import write_bytes_whole
from stablelora_jax.interop.peft_config import from_peft_config, to_peft_config
from stablelora_jax.sites import param_sites

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_peft(directory: str | Path, adapters: Any, spec: LoraSpec, *, base_model: str | None = None) -> None:
    """Write ``adapters`` as a directory that ``peft.PeftModel.from_pretrained`` and vLLM load.

    Args:
      directory: made if needed; an adapter already there is replaced, each file at once.
      adapters: as made by ``init_adapters`` for ``spec``; saved in their own dtype.
      spec: the spec of the adapters.
      base_model: name or path of the base, for PEFT's ``base_model_name_or_path``.

    Raises:
      InputError: adapters that do not fit the spec, that are not finite, or that PEFT has no form for.
    """
    from safetensors.numpy import save

    sites = adapter_sites(adapters, spec)
    tensors = {name: array for site in sites.values() for name, array in _peft_tensors(site, adapters)}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinity: nothing was written to {directory}")
    config = to_peft_config(spec, sites.values(), None if base_model is None else str(base_model))
    text = json.dumps(config, indent=2) + "\n"
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes_whole(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_bytes_whole(directory / CONFIG, text.encode())
    except OSError as error:
        raise InputError(f"cannot write the adapter to {directory}: {error.strerror or error}") from None


def load_peft(directory: str | Path, params: Any) -> tuple[dict[str, Any], LoraSpec]:
    """Read a PEFT adapter for the model whose parameters are ``params``.

    Returns:
      ``(adapters, spec)``: float32 (float64 if the file's are), stacked and padded as ``init_adapters`` makes them.

    Raises:
      InputError: a missing or damaged file, a feature that is not supported, or a tensor that is missing, left over,
        transposed or of another rank than the config says; the message names it.
    """
    directory = Path(directory)
    raw = _read_config(directory / CONFIG)
    tensors = _read_weights(directory / WEIGHTS)
    modules = [name for site in param_sites(params, LoraSpec(target=".*")).values() for name in site.names]
    spec, dropped = from_peft_config(raw, modules, str(directory / CONFIG))
    if dropped:
        warnings.warn(f"{directory / CONFIG}: {', '.join(dropped)} match no module of this model", stacklevel=2)
    sites = param_sites(params, spec)
    _check_tensors(sites, tensors, str(directory / WEIGHTS))
    adapters: dict[str, Any] = {}
    for path, site in sites.items():
        adapters = tree.set_in(adapters, path, _stack(site, tensors))
    return adapters, spec


def _peft_tensors(site: Site, adapters: Any) -> Iterator[tuple[str, np.ndarray]]:
    pair = tree.get_in(adapters, site.path)
    if extra := set(pair) - {"lora_a", "lora_b"}:
        raise InputError(f"{'.'.join(site.path)}: {sorted(extra)[0]} has no place in PEFT's plain LoRA")
    a = np.asarray(pair["lora_a"]).reshape(-1, site.size[0], site.rank)
    b = np.asarray(pair["lora_b"]).reshape(-1, site.rank, site.size[1])
    for i, (name, rank) in enumerate(zip(site.names, site.ranks, strict=True)):
        if rank:
            yield f"{PREFIX}{name}.lora_A.weight", np.ascontiguousarray(a[i, :, :rank].T)
            yield f"{PREFIX}{name}.lora_B.weight", np.ascontiguousarray(b[i, :rank].T)


def _stack(site: Site, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found = [tensors[f"{n}.lora_{f}"] for n, r in zip(site.names, site.ranks, strict=True) if r for f in "AB"]
    dtype = np.result_type(np.float32, *found)
    a = np.zeros((len(site.names), site.size[0], site.rank), dtype)
    b = np.zeros((len(site.names), site.rank, site.size[1]), dtype)
    for i, (name, rank) in enumerate(zip(site.names, site.ranks, strict=True)):
        if rank:
            a[i, :, :rank] = tensors[f"{name}.lora_A"].T
            b[i, :rank] = tensors[f"{name}.lora_B"].T
    reshape = {"lora_a": a.reshape(*site.stack, *a.shape[1:]), "lora_b": b.reshape(*site.stack, *b.shape[1:])}
    return {key: jnp.asarray(value) for key, value in reshape.items()}


def _check_tensors(sites: Mapping[Any, Site], tensors: Mapping[str, np.ndarray], source: str) -> None:
    expected: dict[str, tuple[int, int]] = {}
    for site in sites.values():
        for name, rank in zip(site.names, site.ranks, strict=True):
            if rank:
                expected |= {f"{name}.lora_A": (rank, site.size[0]), f"{name}.lora_B": (site.size[1], rank)}
    for problem, names in (("lacks", set(expected) - set(tensors)), ("holds", set(tensors) - set(expected))):
        if names:
            raise InputError(f"{source} {problem} {sorted(names)[0]} ({len(names)} such), against its {CONFIG}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(f"{source}: {name} has shape {tensors[name].shape}; {CONFIG} and the model say {shape}")
        if not np.isfinite(tensors[name]).all():
            raise InputError(f"{source}: {name} holds NaN or infinity")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: {path.parent} is not a PEFT adapter")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    """Tensors by ``<module>.lora_A`` and ``.lora_B``, in float32 at least."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise InputError(f"{path} does not exist (pickled adapter_model.bin files are never read)")
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {' '.join(str(error).split())[:200]}") from None
    tensors = {}
    for name, array in loaded.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+\.lora_[AB])(?:\.default)?\.weight", name)
        if not found:
            raise InputError(f"{path}: tensor {name} is not {PREFIX}<module>.lora_A.weight or .lora_B.weight")
        tensors[found[1]] = array.astype(np.result_type(array.dtype if array.dtype == np.float64 else np.float32))
    return tensors
