"""Save and load adapters in PEFT's directory format.

A directory holds ``adapter_config.json`` (:mod:`~stablelora_jax.interop.peft_config`), ``adapter_model.safetensors``
(:mod:`~stablelora_jax.interop.peft_layout`) and, if this package wrote it, ``stablelora.json`` with metadata that PEFT
has no key for. Compared with PEFT 0.21, which silently loads a wrong prefix, half of the layers, or magnitudes without
DoRA; here missing and unexpected tensors are errors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stablelora_jax.interop.base_record import KEY as BASE
from stablelora_jax.interop.base_record import base_record, other_base
from stablelora_jax.interop.metadata import OURS, WRITER, load_metadata, require_own
from stablelora_jax.interop.own_record import own_record
from stablelora_jax.interop.peft_config import SUBTRACTED_INIT, to_peft_config
from stablelora_jax.interop.peft_layout import EMBEDDING, HEAD, is_tied, layout
from stablelora_jax.interop.peft_lycoris import as_lora_file
from stablelora_jax.interop.peft_spec import read_spec
from stablelora_jax.interop.peft_tuners import read_tensors, write_tensors
from stablelora_jax.interop.peft_weights import PREFIX, WEIGHTS, assemble, check_tensors, read_weights, stored_name
from stablelora_jax.interop.tuner_form import tuner_form
from stablelora_jax.lora.fitting import fitting_targets
from stablelora_jax.lora.full_parameters import unknown_full_parameters
from stablelora_jax.lora.leaf_checks import require_leaves
from stablelora_jax.lora.leaves import adapter_target_modules, split_frozen, with_frozen
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.peft_config import CONFIG, read_config
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import as_dict
from stablelora_jax.lora.to_lora import lora_shapes, to_lora
from stablelora_jax.lora.transform import init_adapters
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.files import as_path, write_bytes_whole

SHOWN = 10  # names in a warning
UNTIE = "untie them first (model, params = untie(model, params); model.untie of a run; --untie)"


@checked
def save_peft(
    directory: str | Path,
    adapters: Mapping[str, Any],
    spec: LoraSpec,
    *,
    base_model: str | None = None,
    params: Any = None,
    metadata: Mapping[str, Any] | None = None,
    peft_type: str = "LORA",
) -> None:
    """Write ``adapters`` as a directory that ``peft.PeftModel.from_pretrained`` and vLLM load.

    Args:
      directory: made if needed; an adapter that this function has written there is replaced, each file atomically.
      adapters: as made by ``init_adapters`` for ``spec``; saved in their own dtype. Those that are neither LoRA nor
        DoRA, and those whose start stays subtracted, are saved as the LoRA that :func:`.to_lora` gives.
      spec: the spec of the adapters.
      base_model: name or path of the base, for PEFT's ``base_model_name_or_path``.
      params: of the base; ``stablelora.json`` records their fingerprint, by which :func:`load_peft` detects another
        base. Required where an embedding is adapted or parameters are trained in full: PEFT also stores the base's own
        weights of an adapted embedding or head.
      metadata: JSON values that PEFT has no key for (optimizer, shrink ratio, ...), for ``stablelora.json``.
      peft_type: ``"VERA"``, ``"RANDLORA"``, ``"MISS"``, ``"ADALORA"``, ``"SHIRA"`` or ``"VBLORA"``: adapters of that
        parametrisation in the form of PEFT's own tuner, which PEFT can train further. It needs ``params``; vLLM reads
        none of them.

    Raises:
      InputError: adapters that do not fit the spec, are not finite, or cannot be expressed in PEFT's format; another
        program's adapter in ``directory``.
    """
    from safetensors.numpy import save

    directory = as_path(directory, "the adapter's directory")
    require_own(directory, (CONFIG, WEIGHTS, OURS))
    params = None if params is None else as_dict(params)
    if peft_type == "LORA":
        adapters, spec = to_lora(adapters, spec, params=params)
    else:
        adapters, spec = tuner_form(adapters, spec, _own_targets(adapters, spec, params), peft_type)
    targets = require_peft_form(adapters, spec, params, peft_type)
    entries = layout(targets, params, spec)
    tensors = {e.name: e.take(np.asarray(tree.get_in(adapters, e.path))) for e in entries}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{PREFIX}{name} holds NaN or infinity: nothing was written to {directory}")
    config = to_peft_config(spec, targets.values(), base_model, params, [e.name for e in entries])
    tensors, more = write_tensors(tensors, entries, targets.values(), spec)
    config |= more
    tensors = {stored_name(n): array for n, array in (tensors | _base_weights(targets, params)).items()}
    own = {"written_by": WRITER, **own_record(targets, spec), **(metadata or {})}
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
    directory: str | Path, params: Any, *, base_model: str | None = None, strict: bool = False
) -> tuple[dict[str, Any], LoraSpec]:
    """Read a PEFT adapter for the model whose parameters are ``params``.

    There is a warning where ``stablelora.json`` records the base and ``params`` differ from it, and where the config
    names modules that the model does not have.

    Args:
      directory: of the adapter.
      params: of the base.
      base_model: name or path of ``params``, for the warning.
      strict: raise an error instead of the warning about another base.

    Returns:
      ``(adapters, spec)``: float32 (float64 if the file's are), stacked and padded as ``init_adapters`` makes them. Of
      ``peft_type`` VERA, RANDLORA, MISS, ADALORA, SHIRA and VBLORA they are our parametrisations of that name, which
      carry the random factors of the file as ``frozen_...``; LOHA and LOKR are read as plain LoRA.

    Raises:
      InputError: a missing or damaged file, a feature that is not supported, or a tensor that is missing, unexpected,
        transposed or of another rank than the config says; the message names it. With ``strict``, another base.
    """
    directory, params = as_path(directory, "the adapter's directory"), as_dict(params)
    raw, tensors = as_lora_file(read_config(directory), read_weights(directory / WEIGHTS), str(directory / WEIGHTS))
    _refuse_untied(raw, tensors, params, directory)
    record = load_metadata(directory)
    try:
        spec, targets, dropped = read_spec(raw, record, params, tensors)
        entries = layout(targets, params, spec)
    except (InputError, TypeError) as error:
        raise InputError(f"{directory / CONFIG}: {error}") from None
    if dropped:
        names = ", ".join(dropped[:SHOWN]) + f" and {len(dropped) - SHOWN} more" * (len(dropped) > SHOWN)
        warnings.warn(f"{directory / CONFIG}: {names} match no module of this model", stacklevel=4)
    tensors = read_tensors(raw, tensors, entries, targets.values(), spec, str(directory / WEIGHTS))
    base = _base_weights(targets, params) | _whole_layers(params)
    check_tensors(entries, tensors, base, str(directory / WEIGHTS))
    if difference := other_base(record.get(BASE), params, base_model):
        if strict:
            raise InputError(f"{directory} {difference}: give that base, or leave strict out")
        warnings.warn(f"{directory} {difference}: the result is another model than was trained", stacklevel=4)
    return _with_start(assemble(entries, tensors), spec, params), spec


def _with_start(adapters: dict[str, Any], spec: LoraSpec, params: Any) -> dict[str, Any]:
    """``adapters`` with the start that PEFT has subtracted from the base, where ``spec`` has one."""
    if spec.init not in SUBTRACTED_INIT:
        return adapters
    frozen = split_frozen(init_adapters(jax.random.key(0), params, spec))[1]
    return with_frozen(adapters, frozen)  # type: ignore[no-any-return]


def require_peft_form(
    adapters: Mapping[str, Any], spec: LoraSpec, params: Mapping[str, Any] | None = None, peft_type: str = "LORA"
) -> dict[tree.Path, TargetModule]:
    """The adapted modules by path, checked to be expressible in PEFT's format; arguments are those of ``save_peft``.

    Raises:
      InputError: as :func:`save_peft`.
    """
    if peft_type == "LORA":
        adapters, spec = lora_shapes(adapters, spec, params)
    if params is not None:
        targets = fitting_targets(adapters, spec, params)
    else:
        targets = adapter_target_modules(adapters, spec)
        needs = spec.modules_to_save or spec.bias != "none" or any(path[-1] == EMBEDDING for path in targets)
        if needs or unknown_full_parameters(adapters, {}):
            raise InputError("an adapted embedding or parameters trained in full need the base: pass params=")
    require_leaves(targets, adapters, spec)
    if params is not None and is_tied(params) and spec.parametrization != "lora" and ("model", EMBEDDING) in targets:
        raise InputError(f"PEFT has no {spec.parametrization} for an embedding that is tied to the head: {UNTIE}")
    return targets


def _own_targets(
    adapters: Mapping[str, Any], spec: LoraSpec, params: Mapping[str, Any] | None
) -> dict[tree.Path, TargetModule]:
    """The adapted modules of adapters that are no LoRA, whose sizes only the base tells."""
    if params is None:
        raise InputError(f"{spec.parametrization}: the sizes of the kernels are not in the adapters: pass params=")
    targets = fitting_targets(adapters, spec, params)
    require_leaves(targets, adapters, spec)
    return targets


def _base_weights(targets: Mapping[tree.Path, TargetModule], params: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """The base's own weights of an adapted embedding and head, which PEFT stores beside the pairs."""
    if params is None:
        return {}
    found: dict[str, np.ndarray] = {}
    for path in targets:
        leaf = tree.get_in(params, (*path, "embedding" if path[-1:] == (EMBEDDING,) else "kernel"))
        if leaf is None:  # not of our decoder's form
            continue
        if path == ("model", EMBEDDING):
            found[f"model.{EMBEDDING}.base_layer.weight"] = np.asarray(leaf)
            if is_tied(params):
                found[f"{HEAD}.base_layer.weight"] = found[f"model.{EMBEDDING}.base_layer.weight"]
        elif path == (HEAD,):
            found[f"{HEAD}.base_layer.weight"] = np.ascontiguousarray(np.asarray(leaf).T)
    return found


def _whole_layers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Embedding and head of the base, which PEFT stores with ``save_embedding_layers=True``."""
    embedding, head = tree.get_in(params, ("model", EMBEDDING, "embedding")), tree.get_in(params, (HEAD, "kernel"))
    found = {} if embedding is None else {f"model.{EMBEDDING}.weight": np.asarray(embedding)}
    return found if head is None else found | {f"{HEAD}.weight": np.asarray(head).T}


def _refuse_untied(
    raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray], params: Mapping[str, Any], directory: Path
) -> None:
    touched = [name for name in tensors if name.startswith((f"{HEAD}.", f"model.{EMBEDDING}."))]
    alone = not raw.get("ensure_weight_tying") or any(name.endswith("lora_magnitude_vector") for name in touched)
    if touched and is_tied(params) and alone:
        raise InputError(
            f"{directory / WEIGHTS} holds {touched[0]}, which adapts one module alone, but {EMBEDDING} and {HEAD} "
            f"of this base are tied: {UNTIE}"
        )
