"""DoTA: a matrix product operator (tensor train) that starts as the kernel's own (Hu et al., arXiv 2412.20891).

The sides of the kernel are cut into ``cores`` factors, ``in = i_1 ... i_N`` and ``out = j_1 ... j_N``, and the kernel,
as a tensor of the pairs (i_k, j_k), is split by truncated singular value decompositions, one bond after another::

    MPO(T)[i_1 .. i_N, j_1 .. j_N] = T_1[i_1, j_1] T_2[i_2, j_2] ... T_N[i_N, j_N]      T_k (d_k-1, i_k, j_k, d_k)

with bonds d of at most the rank. The change is ``s (MPO(T) - MPO(T0))``, T0 the cores as they start: the paper's
residual ``W0 - MPO(T0)`` and what is trained beside it, where the base is not moved. The factors are as even as the
sides allow, larger ones first; how the paper cuts them we do not know. The paper has no scale: ``scaling: none``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stablelora_jax.lora.parametrizations.lora import Adapter, Keys
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.singular import decomposed

PAIR, READS_KERNEL = "none", True
OPTIONS = {"cores": 3}
pair = None


def start(keys: Keys, w: jax.Array, begun: Adapter, scale: jax.Array, cores: int) -> dict[str, jax.Array]:
    """``lora_core_k`` (d_k-1, i_k, j_k, d_k), k from 1, and the same as ``frozen_core_k``.

    Raises:
      InputError: fewer than two cores, which have no bond.
    """
    if cores < 2:
        raise InputError(f"options: dota needs at least 2 cores, not {cores}")
    dtype, rank = begun["lora_a"].dtype, begun["lora_a"].shape[1]
    own = [core.astype(dtype) for core in _split(w, rank, cores)]
    trained, frozen = ({f"{kind}_core_{k + 1}": core for k, core in enumerate(own)} for kind in ("lora", "frozen"))
    return trained | frozen


def change(adapter: Adapter, w: Float[Array, "in out"], cores: int) -> Float[Array, "in out"]:
    """``MPO(T) - MPO(T0)``."""
    own, first = ([adapter[f"{kind}_core_{k + 1}"] for k in range(cores)] for kind in ("lora", "frozen"))
    return _contracted(own) - _contracted(first)


def _split(w: Float[Array, "in out"], rank: int, cores: int) -> list[jax.Array]:
    """The cores of the kernel, each bond cut to ``rank``: the singular values stay with what is still to be split."""
    rows, columns = (_factors(size, cores) for size in w.shape)
    order = [axis for k in range(cores) for axis in (k, cores + k)]
    rest = w.astype(jnp.promote_types(w.dtype, jnp.float32)).reshape(*rows, *columns).transpose(order)
    found, bond = [], 1
    for i, j in zip(rows[:-1], columns[:-1], strict=True):
        u, s, vt = decomposed(rest.reshape(bond * i * j, -1))
        kept = min(rank, len(s))
        found.append(u[:, :kept].reshape(bond, i, j, kept))
        rest, bond = s[:kept, None] * vt[:kept], kept
    return [*found, rest.reshape(bond, rows[-1], columns[-1], 1)]


def _contracted(cores: Sequence[jax.Array]) -> Float[Array, "in out"]:
    """The matrix (in, out), from the first core on; in the products the thin bond is contracted."""
    whole = cores[0][0]  # (in so far, out so far, bond)
    for core in cores[1:]:
        whole = jnp.einsum("IJd,dijk->IiJjk", whole, core)
        whole = whole.reshape(whole.shape[0] * whole.shape[1], whole.shape[2] * whole.shape[3], -1)
    return whole[..., 0]


def _factors(size: int, count: int) -> tuple[int, ...]:
    """``size`` as a product of ``count`` factors, as even as its primes allow, larger ones first.

    Example::

        >>> _factors(4096, 3), _factors(3072, 3), _factors(31, 2)
        ((16, 16, 16), (16, 16, 12), (31, 1))
    """
    found = [1] * count
    for prime in reversed(_primes(size)):
        found[found.index(min(found))] *= prime
    return tuple(sorted(found, reverse=True))


def _primes(size: int) -> list[int]:
    """The prime factors, in order."""
    found, p = [], 2
    while p <= math.isqrt(size):
        if size % p:
            p += 1
        else:
            found.append(p)
            size //= p
    return [*found, size] if size > 1 else found
