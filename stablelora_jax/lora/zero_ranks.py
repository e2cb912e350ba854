"""Ranks of an adapter that are zero, and so change nothing, left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.to_lora import plain_spec, to_lora
from stablelora_jax.utils import tree
from stablelora_jax.utils.checked import checked


@checked
def without_zero_ranks(
    adapters: Mapping[str, Any], spec: LoraSpec, *, params: Any = None
) -> tuple[dict[str, Any], LoraSpec]:
    """``(adapters, spec)`` of plain LoRA or DoRA with the same function, of the ranks that are not zero.

    A module of which all ranks are zero keeps one. Layers of a stack may then differ in rank: ``rank_pattern`` and
    ``alpha_pattern`` of the spec name them.

    Args:
      adapters: concrete arrays, such as AdaLoRA's after its masks.
      spec: of the adapters.
      params: as for :func:`.to_lora`.

    Raises:
      InputError: as :func:`.to_lora`.
    """
    adapters, spec = to_lora(adapters, spec, params=params)
    targets = adapter_target_modules(adapters, spec)
    ranks: dict[str, int] = {}
    for path, target in targets.items():
        pair = tree.get_in(adapters, path)
        a, b = (np.asarray(pair[name]) for name in ("lora_a", "lora_b"))
        used = (a != 0).any(axis=-2) & (b != 0).any(axis=-1)  # (*stack, rank)
        counts = np.maximum(used.sum(-1).ravel(), np.array(target.ranks) > 0)
        order = np.argsort(~used, axis=-1, kind="stable")[..., : counts.max()]
        kept = np.take_along_axis(used, order, axis=-1)
        a = np.take_along_axis(a, order[..., None, :], axis=-1) * kept[..., None, :]
        b = np.take_along_axis(b, order[..., :, None], axis=-2) * kept[..., :, None]
        adapters = tree.set_in(adapters, path, {**pair, "lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)})
        ranks |= {name: int(n) for name, n in zip(target.names, counts, strict=True)}
    return adapters, plain_spec(spec, list(targets.values()), ranks)
