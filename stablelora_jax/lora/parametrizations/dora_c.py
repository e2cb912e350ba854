"""DoRA-C: DoRA whose direction is that of ``lora_c``, ``K = (K0 + dK) diag(m / n)``, n the norms of the outputs.

m (out,) is trained and starts as the norms of K0, over the axes (h, w, in). The bias is not scaled.
"""

from __future__ import annotations

from stablelora_jax.lora.parametrizations import dora, lora_c

PAIR, READS_KERNEL = "none", True
READS_AXES = True
start, pair = dora.around(lora_c)
gain, delta, merge = dora.gain, dora.delta, dora.merge
