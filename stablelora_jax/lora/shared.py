"""Parameters that modules of a model share: the node ``lora_shared`` at the root of the adapters.

Its own leaves are those of all modules; under the path of a module without the numbers of layers (``model``,
``layers``, ``self_attn``, ``q_proj``) lie those of all modules of this kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stablelora_jax.lora.leaves import leaf_shapes
from stablelora_jax.lora.names import kind_of, layer_number
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.parametrizations.lora import SHARED, Place
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.tree import Path


def share(key: jax.Array, adapters: Any, targets: Mapping[Path, TargetModule], spec: LoraSpec, dtype: DTypeLike) -> Any:
    """``adapters`` with what their modules share; as they are where nothing is.

    Raises:
      InputError: modules that the parametrisation cannot have together.
    """
    member = PARAMETRIZATIONS[spec.parametrization]
    if not shares(spec):
        return adapters
    places = {path: _place(target, spec) for path, target in targets.items()}
    return member.share(key, adapters, places, dtype, **spec.arguments)


def shares(spec: LoraSpec) -> bool:
    """Whether modules share parameters."""
    return hasattr(PARAMETRIZATIONS[spec.parametrization], "share")


def shared_shapes(targets: Mapping[Path, TargetModule], spec: LoraSpec) -> dict[Path, tuple[int, ...]]:
    """The shape of every shared leaf by its path under ``lora_shared``; empty where nothing is shared.

    Raises:
      InputError: modules that the parametrisation cannot have together.
    """
    if not shares(spec):
        return {}
    adapters: dict[str, Any] = {}
    for path, target in targets.items():
        own = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in leaf_shapes(target, spec).items()}
        adapters = tree.set_in(adapters, path, own)
    key = jax.random.key(0)
    made = jax.eval_shape(lambda adapters: share(key, adapters, targets, spec, jnp.float32), adapters)
    return {path: leaf.shape for path, leaf in tree.leaves_by_path(made.get(SHARED, {})).items()}


def shared_by(adapters: Any, path: Path, spec: LoraSpec) -> dict[str, Any]:
    """What the module at ``path`` shares with others: leaves of all modules and of those of its kind, by name."""
    shared = adapters.get(SHARED, {})
    every = {name: leaf for name, leaf in shared.items() if not isinstance(leaf, Mapping)}
    return {**every, **(tree.get_in(shared, kind_of(path, spec.stacked)) or {})} if shared else {}


def _place(target: TargetModule, spec: LoraSpec) -> Place:
    layers = tuple(layer_number(name, spec.stacked) for name in target.names)
    return Place(kind_of(target.path, spec.stacked), target.names, layers, target.ranks, target.size)
