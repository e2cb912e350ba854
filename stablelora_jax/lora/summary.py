"""What is adapted, in words: PEFT's ``print_trainable_parameters`` and a table of the adapted modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from stablelora_jax.lora.fitting import fitting_targets
from stablelora_jax.lora.full_parameters import TrainedParameter, trained_parameters
from stablelora_jax.lora.leaves import FACTORS, is_frozen, leaf_shapes
from stablelora_jax.lora.pairs import TargetModule
from stablelora_jax.lora.parametrizations.lora import SHARED
from stablelora_jax.lora.shared import shared_shapes
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import as_dict
from stablelora_jax.quantization import is_quantized
from stablelora_jax.utils.checked import checked
from stablelora_jax.utils.tree import Path


@checked
def describe(params: Any, adapters: Mapping[str, Any], spec: LoraSpec) -> str:
    """The table of adapted modules and, as its last line, PEFT's count of trained and of all parameters.

    A stack of layers is one row; ranks and scales that differ between its layers are shown as ranges, and padding is
    not counted. ``all params`` includes the adapters, as in PEFT. Of a quantised base a further line gives the size.
    """
    params, adapters = as_dict(params), as_dict(adapters)
    targets, leaves = fitting_targets(adapters, spec, params), trained_parameters(params, spec).values()
    counts = [_count(target, spec) for target in targets.values()]
    shared = [(path, shape) for path, shape in shared_shapes(targets, spec).items() if not is_frozen(path[-1])]
    rows: list[tuple[str, ...]] = [("module", "layers", "in", "out", "rank", "scale", "parameters")]
    rows += [*map(_row, targets.values(), counts), *map(_full_row, leaves), *map(_shared_row, shared)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    full = [*(leaf.shape for leaf in leaves), *(shape for _, shape in shared)]
    trained = sum(counts) + sum(int(np.prod(shape)) for shape in full)
    total = trained + sum(int(np.prod(leaf.shape)) for leaf in flatten_dict(as_dict(params)).values())
    count = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
    return "\n".join([*lines, count, *_quantised(params)])


def _quantised(params: Any) -> list[str]:
    """A line about a quantised base; none about another."""
    leaves = jax.tree.leaves(as_dict(params), is_leaf=is_quantized)
    own = [leaf for leaf in leaves if is_quantized(leaf)]
    if not own:
        return []
    size, bits = sum(int(np.prod(leaf.shape)) for leaf in own), 8 * sum(leaf.nbytes for leaf in own)
    kinds = ", ".join(sorted({type(leaf).__name__ for leaf in own}))
    whole = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(leaves)) / 2**20
    return [
        f"quantised base: {size:,} parameters in {kinds}, {bits / size:.3f} bits each; {whole:,.1f} MiB with the rest"
    ]


def _count(target: TargetModule, spec: LoraSpec) -> int:
    """Trained numbers at ``target``, padding not counted."""
    layers = sum(rank > 0 for rank in target.ranks)
    own = {name: shape[len(target.stack) :] for name, shape in leaf_shapes(target, spec).items() if not is_frozen(name)}
    pair = target.parameters if all(own.pop(name, None) for name in FACTORS) else 0
    return pair + layers * sum(int(np.prod(shape)) for shape in own.values())


def _full_row(leaf: TrainedParameter) -> tuple[str, ...]:
    layers = f"{len(leaf.chosen)} of {int(np.prod(leaf.stack))}" if leaf.stack else "-"
    sizes = [str(size) for size in leaf.own] if len(leaf.own) == 2 else ["", str(int(np.prod(leaf.own)))]
    return (".".join(leaf.path), layers, *sizes, "full", "", f"{int(np.prod(leaf.shape)):,}")


def _shared_row(leaf: tuple[Path, tuple[int, ...]]) -> tuple[str, ...]:
    path, shape = leaf
    return (".".join((SHARED, *path)), "", *map(str, (*shape, "")[:2]), "", "", f"{int(np.prod(shape)):,}")


def _row(target: TargetModule, count: int) -> tuple[str, ...]:
    used = [i for i, rank in enumerate(target.ranks) if rank]
    layers = f"{len(used)} of {len(target.ranks)}" if target.stack else "-"
    ranks = _range([target.ranks[i] for i in used])
    scales = _range([round(target.scales[i], 4) for i in used])
    return (".".join(target.path), layers, *map(str, target.size), ranks, scales, f"{count:,}")


def _range(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
