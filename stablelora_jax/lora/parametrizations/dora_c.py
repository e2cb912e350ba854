"""DoRA-C: DoRA whose direction is that of ``lora_c``, ``K = (K0 + dK) diag(m / n)``, n the norms of the outputs.

m (out,) is trained and starts as the norms of K0, over the axes (h, w, in). The bias is not scaled.
"""

from __future__ import annotations

import jax

from stablelora_jax.lora.parametrizations import dora, lora_c
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "none", True
READS_AXES = True
gain, delta, merge = dora.gain, dora.delta, dora.merge


def start(keys: Keys, w: jax.Array, begun: Adapter, scale: jax.Array, axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """The leaves of ``lora_c``, and ``lora_magnitude_vector`` (out,)."""
    own = lora_c.start(keys, w, begun, scale, axes)
    magnitudes = dora.start(keys, w, lora_c.pair(own, w.shape), scale)["lora_magnitude_vector"]
    return {**own, "lora_magnitude_vector": magnitudes}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """That of ``lora_c``, beside the magnitudes."""
    return {**lora_c.pair(adapter, size), "lora_magnitude_vector": adapter["lora_magnitude_vector"]}
