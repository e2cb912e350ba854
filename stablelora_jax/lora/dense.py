"""Dense parametrisations, whose change of a kernel (in, out) has no low rank: the changed kernel is formed.

Inside a scan and its remat that is one layer at a time. Beside LoRA it costs the gradient with respect to the kernel,
half as much again as the FLOPs of a step, and the memory of one kernel and of its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.leaves import FROZEN
from stablelora_jax.lora.pairs import FULL, TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import target_matrix
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.singular import decomposed
from stablelora_jax.utils.tree import Path

OTHERS = (FULL, "lora_bias", "lora_scale", "lora_key", "lora_dropout")  # beside the leaves of a parametrisation


def is_dense(spec: LoraSpec) -> bool:
    """Whether the change of a kernel is a whole matrix (in, out), and not a pair's."""
    return PARAMETRIZATIONS[spec.parametrization].pair is None


def changed_kernel(w: jax.Array, adapter: Mapping[str, Any], scale: jax.Array, spec: LoraSpec) -> jax.Array:
    """The kernel ``w`` (stack..., in, out) with its change, computed at least in float32, in the dtype of ``w``.

    Args:
      w: the kernel.
      adapter: of the kernel: a plain pair, or the leaves of a dense parametrisation.
      scale: (stack...).
      spec: of the adapter.
    """
    member: Any = PARAMETRIZATIONS[spec.parametrization]
    if not is_dense(spec):
        merged: jax.Array = member.merge(w, adapter, scale)
        return merged
    change = _change(w, adapter, spec)
    return (w.astype(change.dtype) + jnp.asarray(scale, change.dtype)[..., None, None] * change).astype(w.dtype)


def decomposed_changes(
    adapters: Any, targets: Mapping[Path, TargetModule], spec: LoraSpec, params: Mapping[str, Any]
) -> Any:
    """``adapters`` of a dense parametrisation as pairs: the singular triplets of each change, values shared evenly.

    Args:
      adapters: the leaves at ``targets``.
      targets: the adapted modules.
      spec: of the adapters.
      params: the base, with its values.

    Raises:
      InputError: ``params`` are shapes alone.
    """
    for path, target in targets.items():
        if isinstance(tree.get_in(params, target.leaf_path), jax.ShapeDtypeStruct):
            raise InputError(
                f"{spec.parametrization} changes {'.'.join(path)} by its values: pass the base, not shapes"
            )
        node = tree.get_in(adapters, path)
        change = _change(target_matrix(params, target), node, spec)
        found = jax.lax.map(_pair, change.reshape(-1, *target.size))
        pair = {
            name: x.reshape(*target.stack, *x.shape[1:]) for name, x in zip(("lora_a", "lora_b"), found, strict=True)
        }
        adapters = tree.set_in(adapters, path, pair | {FULL: node[FULL]} if FULL in node else pair)
    return adapters


def _change(w: jax.Array, adapter: Mapping[str, Any], spec: LoraSpec) -> jax.Array:
    """The change (stack..., in, out), without its scale, at least in float32."""
    member: Any = PARAMETRIZATIONS[spec.parametrization]
    own = {name: x for name, x in adapter.items() if name.startswith(("lora_", FROZEN)) and name not in OTHERS}
    change = partial(member.change, **spec.arguments)
    for _ in range(w.ndim - 2):
        change = jax.vmap(change)
    found: jax.Array = change(own, w.astype(jnp.promote_types(w.dtype, jnp.float32)))
    return found


def _pair(change: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, s, vt = decomposed(change)
    root = jnp.sqrt(s)
    return u * root[None], root[:, None] * vt
