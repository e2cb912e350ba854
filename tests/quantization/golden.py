"""NF4 once more, from the published tables alone: plain NumPy in float64, one block after another.

Levels: QLoRA, arXiv 2305.14314, appendix E. Middles: the decision tree ``dQuantizeNF4`` of bitsandbytes'
``csrc/kernels.cu``. Map of eight bits: dynamic tree quantisation (arXiv 1511.04561), as in bitsandbytes' documentation.
"""

from __future__ import annotations

import numpy as np

APPENDIX_E = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
TREE = """-0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 -0.23460740596055984
-0.13791173323988914 -0.045525018125772476 0.03979014977812767 0.1202552504837513 0.2035212516784668 0.2920137718319893
0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011"""
LEVELS, MIDDLES = (np.array(text.split(), np.float64) for text in (APPENDIX_E, TREE))

# 12 x 80 numbers, and what quantize_4bit(w, compress_statistics=True, quant_type="nf4") of bitsandbytes 0.50.2 gives
i = np.arange(960)
WEIGHT = (i * 7919 % 1009 - 504) / np.float32(311) * np.float32(2.0) ** (i // 80 - 6)
WEIGHT = WEIGHT.astype(np.float32).reshape(12, 80)
PACKED_START, PACKED_CRC32 = "0ec8521fda7410ec9531fdb7420eda631feb8521fda7310ec9521fdb7420ed9653db97643ca9", 1921267585
ABSMAX, NESTED_ABSMAX, NESTED_OFFSET = "35353535353636383a3a42b3d2f8ff", 40.8488, 10.186568260192871
MAP_CRC32 = 454261483  # of create_dynamic_map(), 256 float32


def dynamic_map() -> np.ndarray:
    """All 256 values, float64: seven decades of either sign with 1, 2, 4 .. 64 values each; 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade
        width = 0.9 / parts
        for j in range(parts):
            found += [sign * 10.0 ** (decade - 6) * (0.1 + (j + 0.5) * width) for sign in (1, -1)]
    return np.array(sorted(found))


def nf4(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The bytes of a weight (out, in), and what they stand for."""
    row = weight.astype(np.float64).reshape(-1)
    nibbles, absmax = [], []
    for start in range(0, row.size, 64):
        block = row[start : start + 64]
        top = np.abs(block).max()
        absmax.append(top)
        nibbles += [int((value > MIDDLES).sum()) for value in (block / top if top else block)]
    nibbles += [7] * (len(nibbles) % 2)
    packed = bytes(16 * high + low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))
    table, rest, codes, nested = dynamic_map(), np.array(absmax) - np.mean(absmax), [], []
    for start in range(0, rest.size, 256):
        group = rest[start : start + 256]
        nested.append(np.abs(group).max())
        codes += [int(np.abs(table - value).argmin()) for value in group / (nested[-1] or 1.0)]
    return {
        "packed": np.frombuffer(packed, np.uint8),
        "absmax": np.array(codes, np.uint8),
        "nested_absmax": np.array(nested),
        "nested_offset": np.mean(absmax),
        "scales": np.array(absmax),
    }
