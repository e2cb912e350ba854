"""The axis of initialisations: where a pair starts. One file each, one line here.

A member is a function ``(key, w, rank, scale, dtype) -> leaves`` for one kernel ``w`` (in, out), deterministic in the
key: ``lora_a`` (in, rank) and ``lora_b`` (rank, out), and where these change the function, ``frozen_a`` and
``frozen_b``, the same values, which stay as they are. The change is then ``s (A B - A0 B0)``: step 0 *is* the base
model, which is neither moved nor rounded, and which adapters of any start share. Where it starts a matrix between the
two, that is ``lora_n`` or ``lora_r`` (rank, rank), by the parametrisation that has it.

What ``w`` is, the tables below say: the kernel, of which most members read the shape alone; what all kernels of a kind
have in common; or, as large as the kernel, what :mod:`stablelora_jax.lora.calibration` measures with data.
"""

from stablelora_jax.lora.initializers.cora import cora
from stablelora_jax.lora.initializers.embedding import embedding
from stablelora_jax.lora.initializers.eva import eva
from stablelora_jax.lora.initializers.gaussian import gaussian
from stablelora_jax.lora.initializers.init_ab import init_ab, init_ab_off
from stablelora_jax.lora.initializers.init_b import init_b
from stablelora_jax.lora.initializers.kaiming import kaiming
from stablelora_jax.lora.initializers.loftq import loftq
from stablelora_jax.lora.initializers.lora_ga import lora_ga
from stablelora_jax.lora.initializers.lora_sb import lora_sb
from stablelora_jax.lora.initializers.milora import milora
from stablelora_jax.lora.initializers.nystrom import nystrom
from stablelora_jax.lora.initializers.olora import olora
from stablelora_jax.lora.initializers.orthogonal import orthogonal
from stablelora_jax.lora.initializers.pissa import pissa, pissa_niter_4
from stablelora_jax.lora.initializers.svd import svd

__all__ = ["CALIBRATED", "INITIALIZERS", "OFF_BASE", "ONE_IS_ZERO", "READ_KERNEL", "READ_KERNELS", "embedding"]

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
    "nystrom": nystrom,
    "olora": olora,
    "svd": svd,
    "cora": cora,
    "lora_ga": lora_ga,
    "lora_sb": lora_sb,
    "eva": eva,
    "loftq": loftq,
}

# The values of ``w`` are read by these, its shape alone by the others.
READ_KERNEL = ("pissa", "pissa_niter_4", "milora", "nystrom", "olora", "svd")
READ_KERNELS = ("cora",)  # ``w`` is ``cora.common`` of all kernels of a kind
CALIBRATED = {  # ``w`` (in, out) is this, which a calibration holds
    "lora_ga": "gradient",  # of the kernel, averaged over batches
    "lora_sb": "update",  # the first step along it
    "eva": "inputs",  # the principal axes of the module's inputs, as columns, times their singular values
    "loftq": "residual",  # the kernel less what its quantised form stands for
}
ONE_IS_ZERO = ("kaiming", "gaussian", "init_b", "cora", "eva")  # one of the factors, at the start
OFF_BASE = ("init_ab_off", "lora_sb", "loftq")  # step 0 is not the base
