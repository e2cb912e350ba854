"""Whether adapters hold the leaves that their spec gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from stablelora_jax.lora.leaves import FACTORS, is_frozen, leaf_shapes
from stablelora_jax.lora.pairs import FULL, TargetModule
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.lora.shared import require_shared
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


def require_leaves(targets: Mapping[Path, TargetModule], adapters: Any, spec: LoraSpec) -> None:
    """Check that each adapter, and what they share, holds what the axes of ``spec`` give it, and nothing else.

    Raises:
      InputError: naming a leaf that is missing, unknown or of another shape.
    """
    for path, target in targets.items():
        node, wanted, name = tree.get_in(adapters, path), leaf_shapes(target, spec), ".".join(path)
        carried = {leaf for leaf in node if is_frozen(leaf) and "frozen_seed" in wanted}  # by an adapter of PEFT's
        if unknown := sorted(set(node) - {*FACTORS, FULL, SHARED, *wanted, *carried}):
            raise InputError(f"{name}: {unknown[0]} has no meaning for {_axes(spec)}")
        for leaf, shape in wanted.items():
            if leaf in FACTORS or (leaf == "frozen_seed" and carried - {"frozen_seed"}):  # checked, or not needed
                continue
            if leaf not in node or jnp.shape(node[leaf]) != shape:
                found = jnp.shape(node[leaf]) if leaf in node else "missing"
                raise InputError(f"{name}: {_axes(spec)} needs {leaf} of shape {shape}; it is {found}")
    require_shared(targets, adapters, spec)


def _axes(spec: LoraSpec) -> str:
    start = f" with init {spec.init!r}" if spec.init != "kaiming" else ""
    return f"parametrization {spec.parametrization!r}{start}"
