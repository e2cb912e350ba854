"""Start a new run from a trained adapter: of another run, or any in PEFT's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.interop.peft import load_peft
from stablelora_jax.interop.peft_config import SUBTRACTED_INIT
from stablelora_jax.lora.full_parameters import trained_parameters
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.errors import InputError


class Resolved(NamedTuple):
    """What a spec trains in a model."""

    modules: dict[str, tuple[int, float]]  # rank and scale of each adapted module
    full: dict[tree.Path, tuple[str, ...]]  # names of the layers of each parameter trained in full


@checked
def start_adapters(
    directory: str | Path, params: Mapping[str, Any], spec: LoraSpec, *, dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Load the adapters at ``directory`` as initial values for ``spec``, in place of ``init_adapters``.

    Modules, ranks, scales, parametrisation and the parameters trained in full must be those of ``spec``, however its
    patterns are written. Dropout may differ, and the initialiser where no start stays subtracted.

    Args:
      directory: in PEFT's layout, with ``adapter_config.json``; any floating dtype.
      params: the base as it will be trained (untied if the run unties it).
      spec: of the new run.
      dtype: of the result, as in ``init_adapters``.

    Returns:
      The adapters, a tree as ``init_adapters`` makes it.

    Raises:
      InputError: all keys of the spec that differ; a value out of the range of ``dtype``; as ``load_peft`` besides.
    """
    ours = _resolve(params, spec)
    loaded, found = load_peft(directory, params)
    if differences := _differences(found, _resolve(params, found), spec, ours, str(directory)):
        raise InputError(f"{directory} does not fit this run: {'; '.join(differences)}")
    adapters: dict[str, Any] = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), loaded)
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        if not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InputError(f"{directory}: {name} holds values out of the range of {jnp.dtype(dtype).name}")
    return adapters


def _resolve(params: Mapping[str, Any], spec: LoraSpec) -> Resolved:
    """What ``spec`` trains in ``params``."""
    targets, leaves = find_target_modules(params, spec), trained_parameters(params, spec)
    modules = {
        name: (rank, scale)
        for target in targets.values()
        for name, rank, scale in zip(target.names, target.ranks, target.scales, strict=True)
        if rank
    }
    return Resolved(modules, {path: leaf.names for path, leaf in leaves.items()})


def _differences(found: LoraSpec, theirs: Resolved, spec: LoraSpec, ours: Resolved, label: str) -> list[str]:
    """A phrase for each key of the spec in which the adapter ``label`` and the run differ."""
    common = [(theirs.modules[name], ours.modules[name]) for name in ours.modules if name in theirs.modules]
    keys = ["parametrization", "lora_bias"]
    keys += ["init"] * (found.init in SUBTRACTED_INIT and found.init != spec.init)
    keys += ["rank", "rank_pattern"] * any(a[0] != b[0] for a, b in common)
    keys += ["alpha", "alpha_pattern", "scaling"] * any(a[1] != b[1] for a, b in common)
    keys += ["modules_to_save", "bias"] * (theirs.full != ours.full)
    lines = [_targets(theirs.modules, ours.modules, f"in {label} only")]
    lines += [_targets(ours.modules, theirs.modules, f"here, not in {label}")]
    lines += [
        f"lora.{key} is {_show(key, found)} in {label} and {_show(key, spec)} here"
        for key in keys
        if getattr(found, key) != getattr(spec, key)
    ]
    return [line for line in lines if line]


def _targets(these: Mapping[str, Any], those: Mapping[str, Any], where: str) -> str:
    only = [name for name in these if name not in those]
    count = f" and {len(only) - 1} more" if len(only) > 1 else ""
    return f"lora.target_modules adapts {only[0]}{count} {where}" if only else ""


def _show(key: str, spec: LoraSpec) -> Any:
    value = getattr(spec, key)
    return dict(value) if key.endswith("pattern") else list(value) if isinstance(value, tuple) else value
