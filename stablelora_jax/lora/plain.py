"""Adapters of any parametrisation as plain pairs, which is how they are applied, merged and exported.

Where a parametrisation has none, the leaves stay as they are: see :mod:`.dense`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.leaves import is_frozen
from stablelora_jax.lora.pairs import FULL, TargetModule
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS, lora
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.lora.shared import shared_by
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.tree import Path

KEPT = (FULL, "lora_bias")  # of whatever parametrisation


def plain_adapters(adapters: Any, targets: Mapping[Path, TargetModule], spec: LoraSpec) -> Any:
    """``adapters`` with a plain pair at each of ``targets``: ``lora_a`` (stack..., in, k) and ``lora_b``.

    Differentiable in what is trained; no gradient reaches a frozen leaf. Plain LoRA and DoRA are returned as they are.
    """
    member = PARAMETRIZATIONS[spec.parametrization]
    whole = adapters
    adapters = {name: node for name, node in whole.items() if name != SHARED} if SHARED in whole else whole
    for path, target in targets.items():
        given = tree.get_in(adapters, path)
        own = {name: leaf for name, leaf in given.items() if name not in KEPT}
        if member.pair is lora.pair and not any(map(is_frozen, own)):
            continue
        own = _held(own)
        if hasattr(member, "across"):
            own = member.across(own, target.mask().any(axis=-1), **spec.arguments)
        if member.pair is not None:
            own = _pair(member, own, _held(shared_by(whole, path, spec)), target, spec)
        kept = {name: given[name] for name in KEPT if name in given}
        adapters = tree.set_in(adapters, path, {**own, **kept})
    return adapters


def _held(leaves: Any) -> Any:
    """``leaves``, which may be NumPy's, as JAX's; the frozen ones pass no gradient."""
    arrays = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    return {name: jax.lax.stop_gradient(leaf) if is_frozen(name) else leaf for name, leaf in arrays.items()}


def _pair(member: Any, own: Any, shared: Any, target: TargetModule, spec: LoraSpec) -> Any:
    """The plain pair of each element of the stack."""
    pair: Any = partial(member.pair, size=target.size, **spec.arguments)
    axes = {**dict.fromkeys(shared), **dict.fromkeys(own, 0)}
    for _ in target.stack:
        pair = jax.vmap(pair, (axes,))
    return pair({**shared, **own})
