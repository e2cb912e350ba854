"""Several adapters of one base: whether they can be taken together, and a spec that covers all of them.

Rules for targets are those of PEFT's ``add_weighted_adapter`` (``peft/tuners/lora/model.py``): lists are united,
expressions joined. PEFT refuses a mixture of the two and takes ``exclude`` and ``layers`` from the first adapter alone,
which drops what only the others adapt; here such specs give one expression that names every module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jax

from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.spec import LoraSpec, items
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.patterns import whole
from stablelora_jax.utils.tree import Path, keys_of


def plain_target_modules(adapters: Any, spec: LoraSpec, label: str) -> dict[Path, TargetModule]:
    """The target modules of ``adapters``, which must be plain LoRA or rsLoRA: nothing but ``lora_a`` and ``lora_b``.

    Raises:
      InputError: another parametrization, a leaf outside the pairs, or adapters that do not fit ``spec``; the message
        begins with ``label``.
    """
    wayout = "only plain LoRA and rsLoRA can be; convert it with to_lora, or merge it into the base with merge"
    if spec.parametrization != "lora":
        raise InputError(f"{label} is {spec.parametrization} and cannot be taken together with others: {wayout}")
    for path, _ in jax.tree_util.tree_leaves_with_path(adapters):
        name = ".".join(keys_of(path))
        if name.rsplit(".", 1)[-1] not in ("lora_a", "lora_b"):
            raise InputError(f"{label} trains {name} and cannot be taken together with others: {wayout}")
    try:
        return adapter_target_modules(adapters, spec)
    except InputError as error:
        raise InputError(f"{label}: {error}") from None


def common_target_modules(parts: Sequence[tuple[Any, LoraSpec]]) -> list[dict[Path, TargetModule]]:
    """The target modules of each of ``parts``, ``(adapters, spec)`` of one base.

    Raises:
      InputError: there are none, one is not plain LoRA, or two are made for modules of different shapes.
    """
    if not parts:
        raise InputError("there are no adapters: give a list of (adapters, spec)")
    targets = [plain_target_modules(adapters, spec, f"adapter {i}") for i, (adapters, spec) in enumerate(parts)]
    known: dict[Path, tuple[int, TargetModule]] = {}
    for i, ((_, spec), found) in enumerate(zip(parts, targets, strict=True)):
        if spec.stacked != parts[0][1].stacked:
            raise InputError(f"adapter {i} has stacked {spec.stacked}, adapter 0 has {parts[0][1].stacked}")
        for path, target in found.items():
            j, other = known.setdefault(path, (i, target))
            if (target.stack, target.size) != (other.stack, other.size):
                mine, theirs = target.stack + target.size, other.stack + other.size
                raise InputError(f"{'.'.join(path)}: adapter {i} is made for {mine}, adapter {j} for {theirs}")
    return targets


def union_spec(specs: Sequence[LoraSpec], ranks: Mapping[str, int]) -> LoraSpec:
    """A spec of scale 1 that selects the modules ``ranks`` names, at those ranks; the rest is the first spec's."""
    first, rank = specs[0], max(ranks.values())
    patterns: Any = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    if patterns and all((s.rank, s.rank_pattern) == (first.rank, first.rank_pattern) for s in specs):
        rank, patterns = first.rank, first.rank_pattern
    return replace(
        first,
        rank=rank,
        alpha=rank,
        scaling="lora",
        rank_pattern=patterns,
        alpha_pattern=patterns,
        in_axes=_united_axes(specs),
        **_united_target_modules(specs, ranks),
    )


def covering_spec(parts: Sequence[tuple[Any, LoraSpec]]) -> LoraSpec:
    """A spec of scale 1, without dropout, that has each module of ``parts`` at the largest rank that it has there.

    Args:
      parts: ``(adapters, spec)`` of one base, in every layer of whose stacks the modules are then selected.
    """
    ranks: dict[str, int] = {}
    for adapters, spec in parts:
        for target in adapter_target_modules(adapters, spec).values():
            ranks |= {name: max(target.rank, ranks.get(name, 0)) for name in target.names}
    named: dict[str, Any] = {"target_modules": exactly(ranks), "exclude_modules": (), "layers_to_transform": None}
    return replace(union_spec([spec for _, spec in parts], ranks), **named, dropout=0.0)


def exactly(names: Iterable[str]) -> str:
    """A regular expression that matches ``names`` and nothing else."""
    return "|".join(re.escape(name) for name in names)


def _united_target_modules(specs: Sequence[LoraSpec], names: Iterable[str]) -> dict[str, Any]:
    targets = list(dict.fromkeys(spec.target_modules for spec in specs))
    if len({(spec.exclude_modules, spec.layers_to_transform) for spec in specs}) == 1:
        if len(targets) == 1:
            return {}
        if all(isinstance(target, tuple) for target in targets):
            return {"target_modules": tuple(name for target in targets for name in target)}
        if all(isinstance(target, str) and target != "all-linear" for target in targets):
            joined = "|".join(f"({target})" for target in targets)
            with suppress(InputError):  # too long
                whole(joined)
                return {"target_modules": joined}
    return {"target_modules": exactly(names), "exclude_modules": (), "layers_to_transform": None}


def _united_axes(specs: Sequence[LoraSpec]) -> dict[str, Any]:
    axes: dict[str, Any] = {}
    for spec in specs:
        for pattern, value in items(spec.in_axes):
            if axes.setdefault(pattern, value) != value:
                raise InputError(f"in_axes of {pattern!r} differ between the adapters: {axes[pattern]} and {value}")
    return axes
