"""The GGUF container: header, tensor table and the decoding of one tensor, by bounded reads of a memory map.

As ``docs/gguf.md`` of ggml-org/ggml specifies it. ``gguf.GGUFReader`` is not used: it makes an array per token (seconds
for a large vocabulary) and does not stop at the end of a damaged file. Values are decoded by ``gguf.quants``.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from stablelora_jax.utils.errors import InputError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST = 2**24  # bytes or values of one entry of the header; ten times those of the largest vocabularies
ELSE = "use the model's safetensors instead"


class Stored(NamedTuple):
    """One tensor of the file: ggml's number of its type, its shape, and the offset of its bytes."""

    kind: int
    shape: tuple[int, ...]
    offset: int


def read_header(file: mmap.mmap) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata and tensor table. A count is never believed further than the file reaches, nor beyond ``MOST``."""
    if _take(file, 4) != b"GGUF":
        raise InputError("not a GGUF file: it does not begin with the letters GGUF")
    version, tensor_count, key_count = struct.unpack("<IQQ", _take(file, 20))
    if version not in (2, 3):
        raise InputError(f"GGUF version {version} is not read (2 and 3, little-endian, are); convert the model again")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = _string(file)
        metadata[key] = _value(file, *struct.unpack("<I", _take(file, 4)))
    table = {}
    for _ in range(tensor_count):
        name = _string(file)
        (rank,) = struct.unpack("<I", _take(file, 4))
        if not 1 <= rank <= 4:
            raise InputError(f"the tensor {name!r:.60} has {rank} dimensions; download the file again")
        sizes = struct.unpack(f"<{rank}Q", _take(file, 8 * rank))
        table[name] = (sizes[::-1], *struct.unpack("<IQ", _take(file, 12)))
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
        raise InputError(f"'general.alignment' = {alignment!r:.60} is not one positive number; download the file again")
    start = -(-file.tell() // alignment) * alignment
    return metadata, {name: Stored(kind, shape, start + at) for name, (shape, kind, at) in table.items()}


def _take(file: mmap.mmap, size: int) -> bytes:
    chunk = file.read(min(size, MOST))
    if len(chunk) < size:
        raise EOFError
    return chunk


def _string(file: mmap.mmap) -> str:
    return _take(file, *struct.unpack("<Q", _take(file, 8))).decode()


def _value(file: mmap.mmap, kind: int) -> Any:
    item, count = struct.unpack("<IQ", _take(file, 12)) if kind == ARRAY else (kind, 1)
    if count > MOST:
        raise EOFError
    if item == STRING:
        values: Any = [_string(file) for _ in range(count)]
    elif item in SCALARS:
        code = SCALARS[item]
        values = list(struct.unpack(f"<{count}{code}", _take(file, count * struct.calcsize("<" + code))))
    else:
        raise InputError(f"a value in the header is of the unknown type {item}; download the file again")
    return values if kind == ARRAY else values[0]


def check_data(table: Mapping[str, Stored], size: int) -> None:
    """Check that every tensor is of a type that ``gguf.quants`` decodes, and inside the file."""
    blocks = {kind: _block(kind) for kind in {tensor.kind for tensor in table.values()}}
    for name, (kind, shape, offset) in table.items():
        length, width = blocks[kind]
        if shape[-1] % length:
            raise InputError(f"the rows of tensor {name!r} are not whole blocks of {length}; convert the model again")
        if offset + math.prod(shape) // length * width > size:
            raise InputError(f"the tensor {name!r} reaches beyond the end of the file: truncated, download it again")


def _block(kind: int) -> tuple[int, int]:
    """Values and bytes in one block of the ggml type ``kind``."""
    gguf = _gguf()
    try:
        length, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        gguf.quants.dequantize(np.zeros((1, width), np.uint8), gguf.GGMLQuantizationType(kind))
    except (ValueError, NotImplementedError):
        raise InputError(f"tensors of ggml type {kind} cannot be decoded by the installed gguf; {ELSE}") from None
    return length, width


def decode(file: mmap.mmap, tensor: Stored) -> np.ndarray:
    """The values of one tensor, float32."""
    gguf = _gguf()
    kind = gguf.GGMLQuantizationType(tensor.kind)
    shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
    data = np.frombuffer(file, np.uint8, math.prod(shape), tensor.offset).reshape(shape)
    return np.require(gguf.quants.dequantize(data, kind), np.float32, "W")  # float32 itself is a view of the file: copy


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise InputError('reading GGUF needs the package gguf: pip install "stablelora-jax[gguf]"') from None
    return gguf
