"""Parameters that all modules of a model share: one node ``lora_shared`` at the root of the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.leaves import leaf_shapes
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


def share(key: jax.Array, adapters: Any, targets: Mapping[Path, TargetModule], spec: LoraSpec) -> Any:
    """``adapters`` with what their modules share; as they are where nothing is.

    Raises:
      InputError: sizes of kernels that the parametrisation cannot have.
    """
    member = PARAMETRIZATIONS[spec.parametrization]
    return member.share(key, adapters, targets, **spec.arguments) if hasattr(member, "share") else adapters


def shared_shapes(targets: Mapping[Path, TargetModule], spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every shared leaf by name; empty where nothing is shared.

    Raises:
      InputError: sizes of kernels that the parametrisation cannot have.
    """
    if not hasattr(PARAMETRIZATIONS[spec.parametrization], "share"):
        return {}
    adapters: dict[str, Any] = {}
    for path, target in targets.items():
        own = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in leaf_shapes(target, spec).items()}
        adapters = tree.set_in(adapters, path, own)
    made = jax.eval_shape(lambda adapters: share(jax.random.key(0), adapters, targets, spec), adapters)
    return {name: leaf.shape for name, leaf in made.get(SHARED, {}).items()}


def require_shared(targets: Mapping[Path, TargetModule], adapters: Any, spec: LoraSpec) -> None:
    """Check what the modules of ``adapters`` share.

    Raises:
      InputError: naming a leaf that is missing, unknown or of another shape.
    """
    found, wanted = adapters.get(SHARED, {}), shared_shapes(targets, spec)
    if set(found) == set(wanted) and all(jnp.shape(found[name]) == shape for name, shape in wanted.items()):
        return
    has = {name: jnp.shape(leaf) for name, leaf in found.items()}
    raise InputError(
        f"parametrization {spec.parametrization!r} needs {wanted or 'nothing'} under {SHARED}, where the adapters have "
        f"{has or 'nothing'}: make them with init_adapters for these modules"
    )
