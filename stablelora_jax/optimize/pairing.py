"""Pairs in a tree: found and checked, labelled, with the scale of each; the other leaves go to AdamW."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from stablelora_jax import tree
from stablelora_jax.adapter import adapter_sites, is_pair
from stablelora_jax.errors import InputError
from stablelora_jax.spec import LoraSpec

Scale = Any  # a number for all pairs, or a tree with an array of the stack's shape at every pair: see scales()


def scales(adapters: Any, spec: LoraSpec) -> Any:
    """The LoRA scale s of each pair, as optimizers take it: a tree with an array of the stack's shape at every pair.

    Args:
      adapters: as made by ``init_adapters`` for ``spec``.
      spec: gives alpha, rank and scaling of each module.

    Raises:
      InputError: the adapters do not fit the spec.
    """
    found: Any = {}
    for path, site in adapter_sites(adapters, spec).items():
        found = tree.set_in(found, path, site.scale())
    return found


def map_pairs(function: Any, params: Any, *rest: Any, other: Any = lambda *leaves: None) -> Any:
    """``function`` on every whole pair of ``params`` and what lies there in ``rest``; ``other`` on all other leaves.

    Raises:
      InputError: a pair of which one factor is hidden by ``optax.masked`` or ``optax.partition``, or shapes that make
        no pair.
    """

    def visit(path: Any, node: Any, *nodes: Any) -> Any:
        if not whole(path, node):
            return other(node, *nodes)
        try:
            return function(node, *nodes)
        except InputError as error:
            raise InputError(f"{jax.tree_util.keystr(path, simple=True, separator='.')}: {error}") from None

    return jax.tree_util.tree_map_with_path(visit, params, *rest, is_leaf=is_pair)


def others_by_adamw(
    pairs: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule, **adamw: Any
) -> optax.GradientTransformationExtraArgs:
    """``pairs`` on the factors of pairs, AdamW on every other leaf: DoRA magnitudes, biases, norms, whole modules."""
    return optax.partition({"pair": pairs, "other": optax.adamw(learning_rate, **adamw)}, label_factors)


def label_factors(params: Any, a: str = "pair", b: str = "pair", other: str = "other") -> Any:
    """A tree like ``params`` that holds the label ``a`` at each ``lora_a`` of a pair, ``b`` at ``lora_b``."""

    def label(pair: Any) -> Any:
        names = {"lora_a": a, "lora_b": b}
        return type(pair)({key: names.get(key) or jax.tree.map(lambda _: other, leaf) for key, leaf in pair.items()})

    return map_pairs(label, params, other=lambda leaf: jax.tree.map(lambda _: other, leaf))


def whole(path: Any, node: Any) -> bool:
    """Whether ``node`` is a pair with both factors there, checked."""
    if not is_pair(node):
        return False
    hidden = [name for name in ("lora_a", "lora_b") if not hasattr(node[name], "ndim")]
    if len(hidden) == 2:
        return False
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if hidden:
        raise InputError(
            f"{name}: {hidden[0]} is hidden by masked or partition, its partner is not; "
            f"an optimizer of pairs needs both: wrap it around the partition"
        )
    a, b = node["lora_a"].shape, node["lora_b"].shape
    if len(a) < 2 or a[:-2] != b[:-2] or a[-1] != b[-2]:
        raise InputError(f"{name}: lora_a {a} and lora_b {b} do not make a pair (..., in, r) and (..., r, out)")
    return True


def require_numbers(low: float = 0.0, below: float = math.inf, **numbers: Any) -> None:
    """Refuse Python numbers outside [low, below); traced values and schedules are not looked at."""
    for name, number in numbers.items():
        if isinstance(number, int | float) and not low <= number < below:
            limits = f"at least {low:g}" if below == math.inf else f"in [{low:g}, {below:g})"
            raise InputError(f"{name} must be {limits}, not {number!r}")
