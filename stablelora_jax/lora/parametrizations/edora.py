"""EDoRA: DoRA whose direction is LoRA-XS's, ``W = (W0 + s A R B) diag(m / n)`` (Nasiri et al., arXiv 2501.12067).

Trained are R (r, r) and the magnitudes m (out,), which start as the norms of W0 with the paper's small R.
"""

from __future__ import annotations

from stablelora_jax.lora.parametrizations import dora, lora_xs

PAIR, READS_KERNEL = "frozen", True
start, pair = dora.around(lora_xs)
gain, delta, merge = dora.gain, dora.delta, dora.merge
