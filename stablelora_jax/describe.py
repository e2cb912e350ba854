"""What is adapted, in words: PEFT's ``print_trainable_parameters`` and a table of the adapted modules."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from stablelora_jax.adapter import LoraSpec, Site
from stablelora_jax.sites import as_dict, fitted_sites


def describe(params: Any, adapters: Any, spec: LoraSpec) -> str:
    """The table of adapted modules and, as its last line, PEFT's count of trained and of all parameters.

    A stack of layers is one row; ranks and scales that differ between its layers are shown as ranges, and padding is
    not counted. ``all params`` includes the adapters, as in PEFT.
    """
    sites = fitted_sites(params, adapters, spec).values()
    rows = [("module", "layers", "in", "out", "rank", "scale", "parameters"), *map(_row, sites)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    trained = sum(site.parameters for site in sites)
    total = trained + sum(int(np.prod(leaf.shape)) for leaf in flatten_dict(as_dict(params)).values())
    count = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
    return "\n".join([*lines, count])


def _row(site: Site) -> tuple[str, ...]:
    used = [i for i, rank in enumerate(site.ranks) if rank]
    layers = f"{len(used)} of {len(site.ranks)}" if site.stack else "-"
    ranks = _range([site.ranks[i] for i in used])
    scales = _range([round(site.scales[i], 4) for i in used])
    return (".".join(site.path), layers, *map(str, site.size), ranks, scales, f"{site.parameters:,}")


def _range(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
