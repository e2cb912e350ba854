"""The axis of initialisations: where a pair starts. One file each, one line here.

A member is a function ``(key, w, rank, scale, dtype) -> leaves`` for one kernel ``w`` (in, out), deterministic in the
key: ``lora_a`` (in, rank) and ``lora_b`` (rank, out), and where these change the function, ``frozen_a`` and
``frozen_b``, the same values, which stay as they are. The change is then ``s (A B - A0 B0)``: step 0 *is* the base
model, which is neither moved nor rounded, and which adapters of any start share.
"""

from stablelora_jax.lora.initializers.embedding import embedding
from stablelora_jax.lora.initializers.gaussian import gaussian
from stablelora_jax.lora.initializers.init_ab import init_ab, init_ab_off
from stablelora_jax.lora.initializers.init_b import init_b
from stablelora_jax.lora.initializers.kaiming import kaiming
from stablelora_jax.lora.initializers.milora import milora
from stablelora_jax.lora.initializers.olora import olora
from stablelora_jax.lora.initializers.orthogonal import orthogonal
from stablelora_jax.lora.initializers.pissa import pissa, pissa_niter_4
from stablelora_jax.lora.initializers.svd import svd

__all__ = ["INITIALIZERS", "ONE_IS_ZERO", "READ_KERNEL", "embedding"]

INITIALIZERS = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "init_b": init_b,
    "init_ab": init_ab,
    "init_ab_off": init_ab_off,
    "pissa": pissa,
    "pissa_niter_4": pissa_niter_4,
    "milora": milora,
    "olora": olora,
    "svd": svd,
}

READ_KERNEL = ("pissa", "pissa_niter_4", "milora", "olora", "svd")  # the values of ``w``; the others its shape alone
ONE_IS_ZERO = ("kaiming", "gaussian", "init_b")  # one of the factors, at the start
