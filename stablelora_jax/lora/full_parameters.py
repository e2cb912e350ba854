"""Parameters trained in full beside the pairs: PEFT's ``modules_to_save`` and ``bias``.

They are in the adapter tree, float32 like the pairs, under the key ``lora_full`` of their module, and replace
those of the base::

    adapters = {"lm_head": {"lora_full": {"kernel": (D, V)}},
                "model": {"layers": {"input_layernorm": {"lora_full": {"scale": (n, D)}}}}}

In a stack of layers only the n chosen layers are there, in order, on one leading axis: nothing is stored, decayed or
averaged for a layer that is not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from stablelora_jax.lora.names import module_names, require_match, stack_depth, suffixes
from stablelora_jax.lora.pairs import FULL
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.lora.target_modules import as_dict, kernel_leaf
from stablelora_jax.quantization import dequantize_tree
from stablelora_jax.utils import tree
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.tree import Path


class TrainedParameter(NamedTuple):
    """One parameter of the tree, or a stack of them, that is trained in full in some or all layers."""

    path: Path  # of the leaf in the base
    names: tuple[str, ...]  # of the modules, one for each chosen layer
    chosen: tuple[int, ...]  # their indices in the flattened stack
    stack: tuple[int, ...]  # shape of the stack axes; () for a single module
    own: tuple[int, ...]  # shape of the parameter in one layer

    @property
    def place(self) -> Path:
        """Its path in the adapter tree."""
        return (*self.path[:-1], FULL, self.path[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape there."""
        return (len(self.chosen), *self.own) if self.stack else self.own


def trained_parameters(params: Any, spec: LoraSpec) -> dict[Path, TrainedParameter]:
    """What ``spec`` trains in full in ``params``, by path.

    Raises:
      InputError: a name in ``modules_to_save`` that matches no module, or ``bias`` where there is none to train.
    """
    if not spec.modules_to_save and spec.bias == "none":
        return {}
    params = as_dict(params)
    leaves = [_trained_parameter(path, leaf.shape, params, spec) for path, leaf in sorted(flatten_dict(params).items())]
    _check_names(leaves, params, spec)
    return {leaf.path: leaf for leaf in leaves if leaf.chosen}


def match_trained_parameters(params: Any, adapters: Any, spec: LoraSpec) -> dict[Path, TrainedParameter]:
    """:func:`trained_parameters`, beside which ``adapters`` hold nothing that is trained in full.

    Raises:
      InputError: they do; as :func:`trained_parameters` besides.
    """
    leaves = trained_parameters(params, spec)
    if unknown := unknown_full_parameters(adapters, leaves):
        raise InputError(f"{'.'.join(unknown[0])} is trained in full, but the spec does not say so")
    return leaves


def init_trained_parameter(params: Any, leaf: TrainedParameter, dtype: DTypeLike) -> jax.Array:
    """The base's own values at ``leaf``, as its training starts."""
    value = tree.get_in(params, leaf.path)
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(value)):
        raise InputError(f"{'.'.join(leaf.path)} is trained in full: its start needs the base itself, not only shapes")
    return _rows(jnp.asarray(dequantize_tree(value), dtype), leaf)


def apply_full_parameters(
    params: dict[str, Any], adapters: Any, leaves: Mapping[Path, TrainedParameter], *, cast: bool
) -> dict[str, Any]:
    """``params`` with the trained values in the place of the base's; ``cast`` to the base's dtypes, or in their own.

    Raises:
      InputError: a value is missing or of another shape.
    """
    for path, leaf in leaves.items():
        base, value = tree.get_in(params, path), tree.get_in(adapters, leaf.place)
        if value is None or jnp.shape(value) != leaf.shape:
            found = "there is none" if value is None else f"it is {jnp.shape(value)}"
            raise InputError(f"{'.'.join(leaf.place)} of the adapters must have the shape {leaf.shape}; {found}")
        dtype = base.dtype if cast else jnp.result_type(value)
        params = tree.set_in(params, path, _laid(base, jnp.asarray(value, dtype), leaf))
    return params


def unknown_full_parameters(adapters: Any, leaves: Mapping[Path, TrainedParameter]) -> list[Path]:
    """Leaves under ``lora_full`` in ``adapters`` that are none of ``leaves``."""
    known = {leaf.place for leaf in leaves.values()}
    return [path for path in flatten_dict(as_dict(adapters)) if FULL in path[:-1] and path not in known]


def _rows(value: jax.Array, leaf: TrainedParameter) -> jax.Array:
    return value.reshape(-1, *leaf.own)[np.array(leaf.chosen)] if leaf.stack else value


def _laid(base: jax.Array, value: jax.Array, leaf: TrainedParameter) -> jax.Array:
    if len(leaf.chosen) == int(np.prod(leaf.stack)):
        return value.reshape(base.shape)
    wide = dequantize_tree(base).astype(value.dtype).reshape(-1, *leaf.own)
    return wide.at[np.array(leaf.chosen)].set(value).reshape(base.shape)


def _trained_parameter(path: Path, shape: tuple[int, ...], params: Any, spec: LoraSpec) -> TrainedParameter:
    depth = stack_depth(path[:-1], spec.stacked)
    depth = depth if len(shape) > depth else 0
    names = module_names(path[:-1], shape[:depth], spec.stacked)
    linear = kernel_leaf(tree.get_in(params, path[:-1])) is not None
    biases = path[-1] == "bias" and (spec.bias == "all" or (spec.bias == "lora_only" and linear))
    chosen = tuple(
        i for i, n in enumerate(names) if spec.saves(n) or (biases and (spec.bias == "all" or spec.selects(n)))
    )
    return TrainedParameter(path, tuple(names[i] for i in chosen), chosen, shape[:depth], shape[depth:])


def _check_names(leaves: list[TrainedParameter], params: Any, spec: LoraSpec) -> None:
    modules = [name for leaf in leaves for name in module_names(leaf.path[:-1], leaf.stack, spec.stacked)]
    ancestors = [".".join(name.split(".")[: i + 1]) for name in set(modules) for i in range(name.count(".") + 1)]
    there = suffixes(ancestors) if spec.modules_to_save else ()
    for pattern in spec.modules_to_save:
        require_match("modules_to_save", pattern, pattern in there, modules)
    if spec.bias != "none" and not any(leaf.path[-1] == "bias" and leaf.chosen for leaf in leaves):
        raise InputError(
            f"bias={spec.bias!r}: the {'adapted modules have' if spec.bias != 'all' else 'model has'} none"
        )
