"""A layer of a quantised base: its kernels are dequantised where it runs, and nowhere else.

Inside a scan and its remat that is one layer at a time, in the forward pass and once more in the backward: policies of
named values do not keep what has no name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from stablelora_jax.quantization import dequantize_tree, is_quantized
from stablelora_jax.utils.errors import InputError


def dequantized(block: Any, variables: Mapping[str, Any], policy: str) -> Any:
    """The Linen class ``block`` as it is, or, where ``variables`` hold quantised kernels, seeing them dense.

    Raises:
      InputError: the remat ``policy`` would keep every layer's dense kernels for the backward pass.
    """
    if not any(map(is_quantized, jax.tree.leaves(variables.get("params", {}), is_leaf=is_quantized))):
        return block
    if policy == "everything":
        raise InputError("remat everything would keep all kernels of a quantised base dequantised: choose save_dots")
    return nn.map_variables(block, "params", trans_in_fn=dequantize_tree)
