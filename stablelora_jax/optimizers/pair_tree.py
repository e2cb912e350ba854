"""Pairs in a tree: found and checked, labelled, with the scale of each; the other leaves go to AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError

FACTORS = ("lora_a", "lora_b")

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
    for path, target in adapter_target_modules(adapters, spec).items():
        found = tree.set_in(found, path, target.scale())
    return found


def map_pairs(function: Any, params: Any, *rest: Any, other: Any = lambda *leaves: None) -> Any:
    """``function`` on every whole pair of ``params`` and what lies there in ``rest``; ``other`` on all other leaves.

    Raises:
      InputError: half a pair, one of which ``optax.masked`` or ``optax.partition`` hides a factor, or factors that make
        no pair.
    """

    def visit(path: Any, node: Any, *nodes: Any) -> Any:
        if not whole(path, node):
            return other(node, *nodes)
        try:
            return function(node, *nodes)
        except InputError as error:
            raise InputError(f"{name_of(path)}: {error}") from None

    return jax.tree_util.tree_map_with_path(visit, params, *rest, is_leaf=holds_factors)


def others_by_adamw(
    pairs: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """``pairs`` on the factors of pairs, AdamW on every other leaf: DoRA magnitudes, biases, norms, whole modules."""
    return optax.partition({"pair": pairs, "other": optax.adamw(learning_rate, **options)}, label_factors)


def label_factors(params: Any, a: str = "pair", b: str = "pair", other: str = "other") -> Any:
    """A tree like ``params`` that holds the label ``a`` at each ``lora_a`` of a pair, ``b`` at ``lora_b``."""

    def label(pair: Any) -> Any:
        names = {"lora_a": a, "lora_b": b}
        return type(pair)({key: names.get(key) or jax.tree.map(lambda _: other, leaf) for key, leaf in pair.items()})

    return map_pairs(label, params, other=lambda leaf: jax.tree.map(lambda _: other, leaf))


def whole(path: Any, node: Any) -> bool:
    """Whether ``node`` is a pair with both factors there, checked."""
    if not holds_factors(node):
        return False
    there = [name for name in FACTORS if hasattr(node.get(name), "ndim")]
    if not there and all(name in node for name in FACTORS):
        return False
    for name in FACTORS:
        if name not in node:
            partner = FACTORS[1 - FACTORS.index(name)]
            raise InputError(f"{name_of(path)} holds {partner} without {name}: an optimizer of pairs needs both")
        if name not in there:
            masked = isinstance(node[name], optax.MaskedNode)
            found = "hidden by masked or partition" if masked else f"{node[name]!r:.60}"
            raise InputError(
                f"{name_of(path)}: {name} is {found}, its partner is not; "
                f"an optimizer of pairs needs both{': wrap it around the partition' * masked}"
            )
    _require_shapes(name_of(path), node["lora_a"], node["lora_b"])
    return True


def holds_factors(node: Any) -> bool:
    """Whether ``node`` is a dict that holds a pair, or half of one."""
    return isinstance(node, Mapping) and any(name in node for name in FACTORS)


def name_of(path: Any) -> str:
    """A path of ``jax.tree_util`` with dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _require_shapes(name: str, a: Any, b: Any) -> None:
    if a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise InputError(
            f"{name}: lora_a {a.shape} and lora_b {b.shape} do not make a pair (..., in, r) and (..., r, out)"
        )
    if 0 in a.shape or 0 in b.shape:
        raise InputError(f"{name}: lora_a {a.shape} and lora_b {b.shape} hold no numbers: every axis needs at least 1")
    for factor, found in zip(FACTORS, (a, b), strict=True):
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise InputError(f"{name}: {factor} is {found.dtype}; an optimizer needs floating point: float32 or wider")
