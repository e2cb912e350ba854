"""EDoRA: DoRA whose direction is LoRA-XS's, ``W = (W0 + s A R B) diag(m / n)`` (Nasiri et al., arXiv 2501.12067).

Trained are R (r, r) and the magnitudes m (out,), which start as the norms of W0 with the paper's small R.
"""

from __future__ import annotations

import jax

from stablelora_jax.lora.parametrizations import dora, lora_xs
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys

PAIR, READS_KERNEL = "frozen", True
gain, delta, merge = dora.gain, dora.delta, dora.merge


def start(keys: Keys, w: jax.Array, begun: Adapter, scale: jax.Array) -> dict[str, jax.Array]:
    """LoRA-XS's leaves, and ``lora_magnitude_vector`` (out,): r^2 + out numbers."""
    own = lora_xs.start(keys, w, begun, scale)
    magnitudes = dora.start(keys, w, lora_xs.pair(own, w.shape), scale)["lora_magnitude_vector"]
    return {**own, "lora_magnitude_vector": magnitudes}


def pair(adapter: Adapter, size: tuple[int, ...]) -> dict[str, jax.Array]:
    """LoRA-XS's, beside the magnitudes."""
    return {**lora_xs.pair(adapter, size), "lora_magnitude_vector": adapter["lora_magnitude_vector"]}
