"""Measurements inside a model that may scan, vmap or remat its layers and gives nothing away.

What an adapted module computes passes through an identity whose *backward* pass yields the measurement as the gradient
of a probe, a leaf of zeros that lies beside the pair: one ``jax.grad`` with respect to all probes then brings every
measurement out, sliced and stacked as the pairs are, and summed over the calls of a module.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def tap(y: jax.Array, probe: jax.Array, measured: jax.Array) -> jax.Array:
    """``y``; backwards, ``measured`` is the gradient of ``probe``, whatever comes back to ``y``."""
    return y


tap.defvjp(
    lambda y, probe, measured: (y, measured),
    lambda measured, cotangent: (cotangent, measured, jnp.zeros_like(measured)),
)


def token_weights(shape: tuple[int, ...], token_mask: Any, dtype: Any) -> jax.Array:
    """How much each position of ``shape`` counts, 0 or 1: by ``token_mask`` (B, T) where ``shape`` begins so."""
    if token_mask is None or shape[:2] != np.shape(token_mask):
        return jnp.ones(shape, dtype)
    real = jnp.asarray(token_mask) != 0
    return jnp.broadcast_to(real.reshape(*real.shape, *(1 for _ in shape[2:])), shape).astype(dtype)


def total(out: Any) -> jax.Array:
    """A scalar that depends on every leaf of ``out`` wherever that can be differentiated."""
    return sum((_total(leaf) for leaf in jax.tree.leaves(out)), jnp.zeros(()))


def _total(leaf: Any) -> jax.Array:
    inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return jnp.real(leaf).astype(jnp.float32).sum() if inexact else jnp.zeros(())
