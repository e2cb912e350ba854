"""Adapters in and out of PEFT's directory format.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` (measured on PEFT 0.21;
:mod:`stablelora_jax.interop.peft_layout` has the tensors, :mod:`~stablelora_jax.interop.peft_config` the config) and,
if we wrote it, ``stablelora.json`` with what PEFT has no key for. PEFT itself loads a wrong prefix, half of the layers
or magnitudes without DoRA and says nothing; here every tensor must be expected and every expected one be there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.interop.base_record import KEY as BASE
from stablelora_jax.interop.base_record import base_record, other_base
from stablelora_jax.interop.metadata import OURS, WRITER, load_metadata, require_own
from stablelora_jax.interop.peft_config import from_peft_config, to_peft_config
from stablelora_jax.interop.peft_layout import EMBEDDING, HEAD, Entry, is_tied, layout
from stablelora_jax.lora.full_parameters import unknown_full_parameters
from stablelora_jax.lora.pairs import TargetModule, adapter_target_modules
from stablelora_jax.lora.peft_config import CONFIG, read_config
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import as_dict, find_target_modules, match_target_modules, require_leaves
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError, brief
from stablelora_jax.utils.files import as_path, write_bytes_whole

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SHOWN = 10  # names that a warning lists
UNTIE = "untie them first (model, params = untie(model, params); model.untie of a run; --untie)"


@checked
def save_peft(
    directory: str | Path,
    adapters: Mapping[str, Any],
    spec: LoraSpec,
    *,
    base_model: str | None = None,
    params: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write ``adapters`` as a directory that ``peft.PeftModel.from_pretrained`` and vLLM load.

    Args:
      directory: made if needed; an adapter that this function has written there is replaced, each file at once.
      adapters: as made by ``init_adapters`` for ``spec``; saved in their own dtype.
      spec: the spec of the adapters.
      base_model: name or path of the base, for PEFT's ``base_model_name_or_path``.
      params: the base; ``stablelora.json`` keeps its fingerprint, by which :func:`load_peft` tells another base. Needed
        where an embedding is adapted or something is trained in full; PEFT stores an adapted embedding's or head's own
        weights, too.
      metadata: JSON values that PEFT has no key for (optimizer, shrink ratio, ...), kept in ``stablelora.json``.

    Raises:
      InputError: adapters that do not fit the spec, that are not finite, or that PEFT has no form for; an adapter of
        another program in ``directory``.
    """
    from safetensors.numpy import save

    directory = as_path(directory, "the adapter's directory")
    require_own(directory, (CONFIG, WEIGHTS, OURS))
    params = None if params is None else as_dict(params)
    targets = require_peft_form(adapters, spec, params)
    entries = layout(targets, params, spec)
    tensors = {PREFIX + e.name: e.take(np.asarray(tree.get_in(adapters, e.place))) for e in entries}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinity: nothing was written to {directory}")
    tensors |= {PREFIX + name: array for name, array in _base_weights(targets, params).items()}
    config = to_peft_config(spec, targets.values(), base_model, params, [e.name for e in entries])
    own = {"written_by": WRITER, **(metadata or {})}
    if params is not None and BASE not in (metadata or {}):
        own[BASE] = base_record(params, base_model)
    ours = json.dumps(own, indent=2, default=str) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes_whole(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_bytes_whole(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        write_bytes_whole(directory / OURS, ours.encode())
    except OSError as error:
        raise InputError(f"cannot write the adapter to {directory}: {error.strerror or error}") from None


@checked
def load_peft(
    directory: str | Path, params: Mapping[str, Any], *, base_model: str | None = None, strict: bool = False
) -> tuple[dict[str, Any], LoraSpec]:
    """Read a PEFT adapter for the model whose parameters are ``params``.

    Where ``stablelora.json`` says which base the adapter was made on, and ``params`` are not that, there is a warning.

    Args:
      directory: of the adapter.
      params: the base that it is laid on.
      base_model: name or path of ``params``, for the warning.
      strict: raise instead of warning about another base.

    Returns:
      ``(adapters, spec)``: float32 (float64 if the file's are), stacked and padded as ``init_adapters`` makes them.

    Raises:
      InputError: a missing or damaged file, a feature that is not supported, or a tensor that is missing, left over,
        transposed or of another rank than the config says; the message names it. With ``strict``, another base.
    """
    directory, params = as_path(directory, "the adapter's directory"), as_dict(params)
    raw = read_config(directory)
    tensors = _read_weights(directory / WEIGHTS)
    _refuse_untied(raw, tensors, params, directory)
    try:
        spec, dropped = from_peft_config(raw, params)
        targets = find_target_modules(params, spec)
        entries = layout(targets, params, spec)
    except (InputError, TypeError) as error:
        raise InputError(f"{directory / CONFIG}: {error}") from None
    if dropped:
        names = ", ".join(dropped[:SHOWN]) + f" and {len(dropped) - SHOWN} more" * (len(dropped) > SHOWN)
        warnings.warn(f"{directory / CONFIG}: {names} match no module of this model", stacklevel=4)
    base = _base_weights(targets, params) | _whole_layers(params)
    _check_tensors(entries, tensors, base, str(directory / WEIGHTS))
    if difference := other_base(load_metadata(directory).get(BASE), params, base_model):
        if strict:
            raise InputError(f"{directory} {difference}: give that base, or leave strict out")
        warnings.warn(f"{directory} {difference}: on this base it is another model", stacklevel=4)
    return _assemble(entries, tensors), spec


def require_peft_form(adapters: Any, spec: LoraSpec, params: Any = None) -> dict[tree.Path, TargetModule]:
    """The sites of ``adapters``, checked to be what PEFT has a form for; arguments and errors of :func:`save_peft`."""
    if params is not None:
        targets = match_target_modules(params, adapters, spec)
    else:
        targets = adapter_target_modules(adapters, spec)
        needs = spec.modules_to_save or spec.bias != "none" or any(path[-1] == EMBEDDING for path in targets)
        if needs or unknown_full_parameters(adapters, {}):
            raise InputError("an adapted embedding or parameters trained in full need the base: pass params=")
    require_leaves(targets, adapters, spec)
    if params is not None and is_tied(params) and spec.parametrization != "lora" and ("model", EMBEDDING) in targets:
        raise InputError(f"PEFT has no {spec.parametrization} of an embedding that is the head, too: {UNTIE}")
    return targets


def _base_weights(targets: Mapping[Any, TargetModule], params: Any) -> dict[str, np.ndarray]:
    """The own weights of an adapted embedding and head, which PEFT stores beside the pairs."""
    if params is None:
        return {}
    found = {}
    for path in targets:
        if path == ("model", EMBEDDING):
            found[f"model.{EMBEDDING}.base_layer.weight"] = np.asarray(params["model"][EMBEDDING]["embedding"])
            if is_tied(params):
                found[f"{HEAD}.base_layer.weight"] = found[f"model.{EMBEDDING}.base_layer.weight"]
        elif path == (HEAD,):
            found[f"{HEAD}.base_layer.weight"] = np.ascontiguousarray(np.asarray(params[HEAD]["kernel"]).T)
    return found


def _whole_layers(params: Any) -> dict[str, np.ndarray]:
    """Embedding and head of the base, which PEFT adds with ``save_embedding_layers=True``."""
    embedding, head = tree.get_in(params, ("model", EMBEDDING, "embedding")), tree.get_in(params, (HEAD, "kernel"))
    found = {} if embedding is None else {f"model.{EMBEDDING}.weight": np.asarray(embedding)}
    return found if head is None else found | {f"{HEAD}.weight": np.asarray(head).T}


def _refuse_untied(raw: Mapping[str, Any], tensors: Mapping[str, Any], params: Any, directory: Path) -> None:
    touched = [name for name in tensors if name.startswith((f"{HEAD}.", f"model.{EMBEDDING}."))]
    alone = not raw.get("ensure_weight_tying") or any(name.endswith("lora_magnitude_vector") for name in touched)
    if touched and is_tied(params) and alone:
        raise InputError(
            f"{directory / WEIGHTS} holds {touched[0]}, which PEFT changes alone, but {EMBEDDING} and {HEAD} "
            f"of this base are tied: {UNTIE}"
        )


def _check_tensors(
    entries: Sequence[Entry], tensors: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], source: str
) -> None:
    expected = {entry.name: entry.shape for entry in entries}
    missing, extra = set(expected) - set(tensors), set(tensors) - set(expected) - set(base)
    for problem, names in (("lacks", missing), ("holds", extra)):
        if names:
            raise InputError(f"{source} {problem} {sorted(names)[0]} ({len(names)} such), against its {CONFIG}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(f"{source}: {name} has shape {tensors[name].shape}; {CONFIG} and the model say {shape}")
        if not np.isfinite(_wide(tensors[name])).all():
            raise InputError(f"{source}: {name} holds NaN or infinity")
    for name in set(base) & set(tensors) - set(expected):
        if not _same(tensors[name], base[name]):
            raise InputError(f"{source}: {name} differs from the base that was given: the adapter belongs to another")


def _same(stored: np.ndarray, own: np.ndarray) -> bool:
    """Whether the base's weights in a file are those of the base that is given, at the lesser of their precisions."""
    narrow = min(stored.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return stored.shape == own.shape and np.array_equal(stored.astype(narrow), own.astype(narrow))


def _wide(array: np.ndarray) -> np.ndarray:
    """``array`` in float32, or in float64 where it is that and such arrays are enabled."""
    wide = np.float64 if jax.dtypes.canonicalize_dtype(array.dtype) == np.float64 else np.float32
    with np.errstate(over="ignore"):  # which is found where all numbers must be finite
        return array.astype(wide)


def _assemble(entries: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The adapter tree; two tensors for one place (a tied head) must agree."""
    leaves: dict[tree.Path, np.ndarray] = {}
    written: dict[Any, str] = {}
    tensors = {entry.name: _wide(tensors[entry.name]) for entry in entries}
    dtype = np.result_type(np.float32, *tensors.values())
    for entry in entries:
        leaf = leaves.setdefault(entry.place, np.zeros(entry.whole, dtype))
        twin = written.setdefault((entry.place, str(entry.at)), entry.name)
        if twin == entry.name:
            entry.put(leaf, tensors[entry.name])
        elif not np.array_equal(entry.take(leaf), tensors[entry.name]):
            raise InputError(f"{entry.name} differs from {twin}, though ensure_weight_tying says they are one")
    adapters: dict[str, Any] = {}
    for place, leaf in leaves.items():
        adapters = tree.set_in(adapters, place, jnp.asarray(leaf))
    return adapters


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name without prefix and without the adapter name ``default``, as they are stored."""
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
        if not name.startswith(PREFIX):
            raise InputError(f"{path}: tensor {name} is not {PREFIX}<module>.lora_A.weight or the like")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{path}: tensor {name} is of type {array.dtype}, not floating")
        tensors[name.removeprefix(PREFIX).replace(".default.", ".").removesuffix(".default")] = array
    return {name: array for name, array in tensors.items() if not _copy(name, tensors)}


def _copy(name: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether ``name`` is one of the copies that PEFT adds where both bias and modules_to_save are on."""
    if ".original_module." in name:
        return True
    plain = name.replace(".modules_to_save.", ".")
    return plain != name and plain in tensors and np.array_equal(tensors[plain], tensors[name])
