"""Checkpoints whose layers bitsandbytes has quantised to NF4, read as they are: no number is decoded.

Beside each quantised ``NAME.weight`` (n / 2, 1) uint8 are, under ``NAME.weight.``: ``absmax``, ``quant_map``,
``nested_absmax``, ``nested_quant_map``, and ``quant_state.bitsandbytes__nf4``, a JSON object as bytes with the shape,
the sizes of blocks and the mean of the scales. The maps have to be those of :mod:`~stablelora_jax.quantization.nf4`,
which one bit may tell apart from those of the machine that wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from stablelora_jax.models.pretrained.tensors import TensorSource
from stablelora_jax.quantization import nf4
from stablelora_jax.utils.errors import InputError

KEY = "quantization_config"
STATE = ".quant_state.bitsandbytes__nf4"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
WANTED = {"blocksize": nf4.BLOCK, "nested_blocksize": nf4.GROUP, "quant_type": "nf4"}
ELSE = "only NF4 of bitsandbytes with double quantisation is read; give the model as it was before, and quantize"


def unpacked(raw: Mapping[str, Any], source: TensorSource) -> tuple[dict[str, Any], TensorSource]:
    """``config.json`` without its ``quantization_config``, and the tensors under the names of a model that has none.

    Quantised ones have the shape (out, in) there, and are had from ``source.quantized``.

    Raises:
      InputError: another quantisation method, or tensors that do not fit it.
    """
    config = raw[KEY] if isinstance(raw[KEY], Mapping) else {}
    nested = config.get("quant_method") == "bitsandbytes" and config.get("bnb_4bit_use_double_quant") is True
    if not nested or config.get("load_in_4bit") is not True or config.get("bnb_4bit_quant_type") != "nf4":
        raise InputError(f"{source.origin}: {KEY} = {raw[KEY]!r:.60}: {ELSE}")
    weights = sorted(name.removesuffix(STATE) for name in source.shapes if name.endswith(STATE))
    states = {name: _state(source, name) for name in weights}
    parts = {name + part for name in weights for part in PARTS}
    shapes = {name: shape for name, shape in source.shapes.items() if name not in parts}
    shapes |= {name: tuple(state["shape"]) for name, state in states.items()}

    def read(name: str, dtype: DTypeLike) -> nf4.NF4:
        if name not in states:
            raise InputError(f"{source.origin}: {name} is not quantised, as other layers are: {ELSE}")
        return _leaf(source, name, states[name], dtype)

    return {k: v for k, v in raw.items() if k != KEY}, source._replace(shapes=shapes, quantized=read)


def _state(source: TensorSource, name: str) -> dict[str, Any]:
    try:
        state = json.loads(source.read(name + STATE).tobytes())
        shape = [int(size) for size in state["shape"]]
        offset = float(state["nested_offset"])
        if not abs(offset) <= float(np.finfo(np.float32).max):
            raise ValueError(offset)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise InputError(f"{source.origin}: {name}{STATE} is not what bitsandbytes writes: {ELSE}") from None
    if len(shape) != 2 or min(shape) < 1 or any(state.get(key) != value for key, value in WANTED.items()):
        raise InputError(f"{source.origin}: {name} has blocks or a shape that are not read: {ELSE}")
    return {"shape": shape, "offset": offset}


def _leaf(source: TensorSource, name: str, state: Mapping[str, Any], dtype: DTypeLike) -> nf4.NF4:
    rows, columns = state["shape"]
    blocks = -(-rows * columns // nf4.BLOCK)
    for part, levels in ((".quant_map", nf4.LEVELS), (".nested_quant_map", nf4.MAP)):
        found = _part(source, name + part, len(levels), np.float32)
        if not np.allclose(found, levels, rtol=0, atol=1e-6):
            raise InputError(f"{source.origin}: {name}{part} holds other levels: {ELSE}")
    arrays: Any = (
        _part(source, name, -(-rows * columns // 2), np.uint8),
        _part(source, name + ".absmax", blocks, np.uint8),
        _part(source, name + ".nested_absmax", -(-blocks // nf4.GROUP), np.float32),
        np.float32(state["offset"]),
    )
    return nf4.NF4((columns, rows), jnp.dtype(dtype), *arrays)


def _part(source: TensorSource, name: str, size: int, dtype: Any) -> np.ndarray:
    if name not in source.shapes and not name.endswith(".weight"):
        raise InputError(f"{source.origin} lacks tensors: {name}, of a quantised weight")
    found = source.read(name).reshape(-1)
    if found.size != size or found.dtype != dtype or (found.dtype == np.float32 and not np.isfinite(found).all()):
        raise InputError(f"{source.origin}: tensor {name} is not {size} finite numbers of {np.dtype(dtype)}")
    return found
