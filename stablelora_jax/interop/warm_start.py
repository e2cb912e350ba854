"""A new run that begins with an adapter there is: of another run, or anything in PEFT's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.interop.peft import load_peft
from stablelora_jax.lora.full_parameters import trained_parameters
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError


@checked
def start_adapters(
    directory: str | Path, params: Mapping[str, Any], spec: LoraSpec, *, dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """The adapters at ``directory`` in the place of fresh ones; the optimizer starts anew.

    What they compute must be what ``spec`` makes of them: the same modules, ranks, scales, parametrisation and
    parameters trained in full, however these are written. Dropout and initialiser may differ.

    Args:
      directory: in PEFT's layout, with ``adapter_config.json``; any float dtype.
      params: the base, as it is to be trained (untied if the run unties it).
      spec: of the new run.
      dtype: of the result, as in ``init_adapters``.

    Raises:
      InputError: naming all keys of the spec that differ; a number beyond ``dtype``; as ``load_peft`` besides.
    """
    wanted = _meaning(params, spec)
    adapters, found = load_peft(directory, params)
    if differences := _differences(found, _meaning(params, found), spec, wanted, str(directory)):
        raise InputError(f"{directory} does not fit this run: {'; '.join(differences)}")
    adapters = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), adapters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        if not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InputError(f"{directory}: {name} holds numbers beyond {jnp.dtype(dtype).name}")
    return adapters


def _meaning(params: Any, spec: LoraSpec) -> tuple[dict[str, tuple[int, float]], Any]:
    """(rank, scale) of each adapted module by name, and the layers of each parameter trained in full by path."""
    targets, leaves = find_target_modules(params, spec), trained_parameters(params, spec)
    return _modules(targets.values()), {path: leaf.names for path, leaf in leaves.items()}


def _modules(targets: Any) -> dict[str, tuple[int, float]]:
    return {
        name: (rank, scale)
        for target in targets
        for name, rank, scale in zip(target.names, target.ranks, target.scales, strict=True)
        if rank
    }


def _differences(found: LoraSpec, theirs: Any, spec: LoraSpec, ours: Any, label: str) -> list[str]:
    """What keeps an adapter from being the start of a run, a phrase for each key of the spec."""
    (their_modules, their_full), (our_modules, our_full) = theirs, ours
    common = [(their_modules[name], our_modules[name]) for name in our_modules if name in their_modules]
    keys = ["parametrization", "lora_bias"]
    keys += ["rank", "rank_pattern"] * any(a[0] != b[0] for a, b in common)
    keys += ["alpha", "alpha_pattern", "scaling"] * any(a[1] != b[1] for a, b in common)
    keys += ["modules_to_save", "bias"] * (their_full != our_full)
    lines = [_targets(their_modules, our_modules, f"in {label} alone")]
    lines += [_targets(our_modules, their_modules, f"here, not in {label}")]
    lines += [
        f"lora.{key} is {_show(key, found)} in {label} and {_show(key, spec)} here"
        for key in keys
        if getattr(found, key) != getattr(spec, key)
    ]
    return [line for line in lines if line]


def _targets(these: Mapping[str, Any], those: Mapping[str, Any], where: str) -> str:
    alone = [name for name in these if name not in those]
    others = f" ({len(alone)} such)" if len(alone) > 1 else ""
    return f"lora.target_modules adapts {alone[0]}{others} {where}" if alone else ""


def _show(key: str, spec: LoraSpec) -> Any:
    value = getattr(spec, key)
    return dict(value) if key.endswith("pattern") else list(value) if isinstance(value, tuple) else value
