"""A layer of a quantised base: its kernels are dequantised when it runs.

Inside a scan and its remat that is one layer at a time, in the forward pass and once more in the backward: remat
policies save named values only, and dequantised kernels have no name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax

from stablelora_jax.quantization import dequantize_tree, is_quantized
from stablelora_jax.utils.errors import InputError

Layer = TypeVar("Layer", bound=nn.Module)


def dequantized(block: type[Layer], variables: Mapping[str, Any], policy: str) -> type[Layer]:
    """The Linen class ``block``, with dequantised kernels where ``variables`` hold quantised ones.

    Raises:
      InputError: the remat ``policy`` would keep every layer's dense kernels for the backward pass.
    """
    if not any(map(is_quantized, jax.tree.leaves(variables.get("params", {}), is_leaf=is_quantized))):
        return block
    if policy == "everything":
        raise InputError("remat everything would keep all kernels of a quantised base dequantised: choose save_dots")
    return nn.map_variables(block, "params", trans_in_fn=dequantize_tree)
