"""Adapters as one of PEFT's other tuners has them: one rank, the tuner's scale, random factors of one draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.parametrizations import randlora, vera
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.lora.peft_tuners import PEFT_TYPES, TUNERS
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path

MISS = ("miss", "miss_mini")
# The leaf by which dW is scaled.
SCALED = {"vera": "lora_lambda_b", "randlora": "lora_lambda", "adalora": "lora_e", "shira": "lora_values"}
SCALED |= {"bat": "lora_blocks", **dict.fromkeys(MISS, "lora_d")}


def tuner_form(
    adapters: Any, spec: LoraSpec, targets: Mapping[Path, TargetModule], peft_type: str
) -> tuple[Any, LoraSpec]:
    """``(adapters, spec)`` with the same function, such that PEFT's tuner ``peft_type`` can say all of it.

    Raises:
      InputError: the tuner is of another parametrisation, or has one rank where these have several.
    """
    if peft_type not in PEFT_TYPES:
        raise InputError(f"peft_type must be LORA or one of {', '.join(PEFT_TYPES)}, not {peft_type!r:.80}")
    form = spec.parametrization
    if form not in TUNERS or TUNERS[form].peft_type != peft_type:
        known = next(name for name, tuner in TUNERS.items() if tuner.peft_type == peft_type)
        raise InputError(f"peft_type={peft_type!r} is for {known} adapters, not {form}: leave it out")
    ranks = sorted({rank for target in targets.values() for rank in target.ranks if rank})
    if len(ranks) > 1 and form != "adalora":
        raise InputError(f"PEFT's {peft_type} has one rank for all modules, not {ranks}: leave peft_type out")
    scaling = TUNERS[form].arguments["scaling"]
    plain = replace(spec, rank=ranks[-1], rank_pattern={}, alpha_pattern={}, scaling=scaling)
    if form == "vblora":
        return _with_bank(adapters, targets), plain
    fan_in = max(target.size[0] for target in targets.values())
    for path, target in targets.items():
        node = dict(tree.get_in(adapters, path))
        if "frozen_seed" in node:
            node = _drawn(node, target, form, fan_in)
        factor = target.scale() / plain.scale_of("")
        leaf = node[SCALED[form]]
        node[SCALED[form]] = leaf * factor.reshape(*target.stack, *(1,) * (leaf.ndim - factor.ndim)).astype(leaf.dtype)
        adapters = tree.set_in(adapters, path, _padded(node, plain.rank) if form == "adalora" else node)
    return adapters, plain


def _with_bank(adapters: Any, targets: Mapping[Path, TargetModule]) -> Any:
    """VB-LoRA's adapters without a scale: both factors are linear in the bank, which takes its root."""
    scales = {s for target in targets.values() for s, rank in zip(target.scales, target.ranks, strict=True) if rank}
    if len(scales) > 1:
        raise InputError(f"PEFT's VBLORA has one bank and no scale, not scales {sorted(scales)}: leave peft_type out")
    bank = tree.get_in(adapters, (SHARED, "lora_bank"))
    return tree.set_in(adapters, (SHARED, "lora_bank"), bank * scales.pop() ** 0.5)


def _drawn(node: dict[str, Any], target: TargetModule, form: str, fan_in: int) -> dict[str, Any]:
    """With the random factors in the place of their seed; VeRA's A of one bound for all modules, d making up for it."""
    own = {name: leaf for name, leaf in node.items() if name.startswith(("lora_lambda", "lora_gamma", "frozen_"))}
    draw: Any = partial(vera.bases, size=target.size, fan_in=fan_in)
    draw = draw if form == "vera" else partial(randlora.bases, size=target.size)
    for _ in target.stack:
        draw = jax.vmap(draw)
    names = ("frozen_a", "frozen_b") if form == "vera" else ("frozen_wide", "frozen_thin")
    kept = {name: leaf for name, leaf in node.items() if name != "frozen_seed"}
    kept |= dict(zip(names, draw(own), strict=True))
    if form == "vera":
        kept["lora_lambda_d"] = node["lora_lambda_d"] * (fan_in / target.size[0]) ** 0.5
    return kept


def _padded(node: dict[str, Any], rank: int) -> dict[str, Any]:
    """AdaLoRA's leaves at ``rank``: what is beyond their own is zero, as what has been pruned."""
    axes = {"lora_a": -1, "lora_b": -2, "lora_e": -1}
    for name, axis in axes.items():
        leaf = node[name]
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, rank - leaf.shape[axis])
        node[name] = jnp.pad(leaf, widths)
    return node
