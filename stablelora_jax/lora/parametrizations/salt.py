"""SALT: the largest singular values are scaled and shifted, the rest has a low rank (Elsayed et al., arXiv 2503.16055).

Of the kernel ``W0 = U diag(S) V^T`` the k largest singular values become ``relu((1 + a) S + b)``, and between the other
singular vectors X Y, of rank r, is added::

    dW = s (U_k diag(relu((1 + a) S_k + b) - S_k) V_k^T + U_rest X Y V_rest^T)

That is a pair of rank k + r. The shift of the factor from 1 is trained, so that zeros change nothing. The authors' code
(modeling/SALT.py) takes the relu of the whole matrix of singular values with X Y in it, which also clips the negative
entries beside the diagonal: half of X Y and of its gradient. Here it is of the scaled values alone, which are what the
relu keeps from turning negative. X starts as a factor A does and Y at zero, as in their code for SAM 2; that for SAM,
where both are N(0, 0.01^2), does not start at the base. ``scaling: none`` is theirs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stablelora_jax.lora.parametrizations import lora
from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.singular import decomposed

PAIR, READS_KERNEL = "none", True
OPTIONS = {"k": 0.1}  # singular values that are scaled: their number, or below 1 a part of all
gain, delta, merge = lora.gain, lora.delta, lora.merge


def start(keys: Keys, w: jax.Array, begun: Adapter, scale: jax.Array, k: float) -> dict[str, jax.Array]:
    """``lora_alpha`` and ``lora_beta`` (k,), ``lora_x`` (p - k, r), ``lora_y`` (r, p - k): 2 k + 2 r (p - k) numbers.

    p is the smaller side of the kernel. Frozen are U (in, p), V^T (p, out) and the k values: twice the kernel's memory.

    Raises:
      InputError: a k that is no number of singular values, or leaves none of them over.
    """
    dtype, rank, small = begun["lora_a"].dtype, begun["lora_a"].shape[1], min(w.shape)
    top = int(k) if k >= 1 else max(1, int(k * small))
    if k >= 1 and top != k:
        raise InputError(f"options: k must be a part below 1 or a whole number of singular values, not {k!r}")
    if top >= small:
        raise InputError(f"options: k {top} leaves none of the {small} singular values of a kernel {w.shape}: lower it")
    u, s, vt = decomposed(w)
    bound = (small - top) ** -0.5
    return {
        "lora_alpha": jnp.zeros(top, dtype),
        "lora_beta": jnp.zeros(top, dtype),
        "lora_x": jax.random.uniform(keys.own, (small - top, rank), dtype, -bound, bound),
        "lora_y": jnp.zeros((rank, small - top), dtype),
        "frozen_u": u.astype(dtype),
        "frozen_s": s[:top].astype(dtype),
        "frozen_v": vt.astype(dtype),
    }


def pair(adapter: Adapter, size: tuple[int, ...], k: float) -> dict[str, jax.Array]:
    """A = [U_k diag(...), U_rest X] (in, k + r), B = [V_k^T; Y V_rest^T] (k + r, out)."""
    u, s, vt = adapter["frozen_u"], adapter["frozen_s"], adapter["frozen_v"]
    top = s.shape[0]
    moved = jax.nn.relu((1 + adapter["lora_alpha"]) * s + adapter["lora_beta"]) - s
    a = jnp.concatenate([u[:, :top] * moved[None], jnp.matmul(u[:, top:], adapter["lora_x"])], axis=1)
    b = jnp.concatenate([vt[:top], jnp.matmul(adapter["lora_y"], vt[top:])], axis=0)
    return {"lora_a": a, "lora_b": b}
