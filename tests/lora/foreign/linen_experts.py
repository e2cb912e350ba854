"""Mixtures of experts in Linen, in the forms in which public models write them, tiny."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

NORMAL = nn.initializers.normal(0.3)


class Expert(nn.Module):
    """One expert's MLP."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="wo")(nn.gelu(nn.Dense(10, name="wi")(x)))


class VmapExperts(nn.Module):
    """Dense experts under ``nn.vmap``, each with its own slots."""

    @nn.compact
    def __call__(self, x):
        axes, rngs = {"params": 0}, {"params": True}
        experts = nn.vmap(Expert, variable_axes=axes, split_rngs=rngs, in_axes=0, out_axes=0, axis_size=x.shape[0])
        return experts(name="experts")(x)


class EinsumExperts(nn.Module):
    """Bare weights (E, in, out), the expert a batch axis of the product; parameters with logical axes, in boxes."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(NORMAL, ("expert", "embed", "mlp"))
        wi = self.param("wi", init, (x.shape[0], x.shape[-1], 10))
        wo = self.param("wo", init, (x.shape[0], 10, x.shape[-1]))
        return jnp.einsum("ecf,efd->ecd", nn.gelu(jnp.einsum("ecd,edf->ecf", x, wi)), wo)


class SlotMixture(nn.Module):
    """Each token is sent to the slots of its two best experts by a one-hot product."""

    experts: type[nn.Module]
    number: int = 3
    slots: int = 4

    @nn.compact
    def __call__(self, x):
        probabilities = nn.softmax(nn.Dense(self.number, use_bias=False, name="router")(x))
        values, chosen = jax.lax.top_k(probabilities, 2)
        chosen = jax.nn.one_hot(chosen, self.number)  # (b, t, 2, e)
        position = jnp.cumsum(chosen.sum(2), axis=1) - 1  # (b, t, e)
        slots = jax.nn.one_hot(jnp.where(chosen.sum(2) > 0, position, -1), self.slots)  # (b, t, e, c)
        combine = slots * (values[..., None] * chosen).sum(2)[..., None]
        inputs = jnp.einsum("btd,btec->ebcd", x, slots).reshape(self.number, -1, x.shape[-1])
        outputs = self.experts(name="moe")(inputs).reshape(self.number, x.shape[0], self.slots, -1)
        return x + jnp.einsum("ebcd,btec->btd", outputs, combine)


class RaggedMixture(nn.Module):
    """Tokens sorted by expert, ``ragged_dot``, gate and value in one weight (E, in, 2, out); the best expert only."""

    number: int = 3
    hidden: int = 5

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        flat = x.reshape(-1, width)
        router = self.param("router", NORMAL, (width, self.number))
        probabilities = nn.softmax(flat @ router)
        chosen = probabilities.argmax(-1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=self.number).astype(jnp.int32)
        gate_up = self.param("gate_up_proj", NORMAL, (self.number, width, 2, self.hidden))
        down = self.param("down_proj", NORMAL, (self.number, self.hidden, width))
        fused = jax.lax.ragged_dot(flat[order], gate_up.reshape(self.number, width, -1), sizes)
        gate, up = jnp.split(fused, 2, axis=-1)
        y = jax.lax.ragged_dot(nn.silu(gate) * up, down, sizes)[jnp.argsort(order)]
        return x + (y * probabilities.max(-1, keepdims=True)).reshape(x.shape)


class DenseMixture(nn.Module):
    """Every expert sees every token; gate and value of bare weights (E, in, 2, out) in one product."""

    number: int = 3
    hidden: int = 5

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        probabilities = nn.softmax(nn.Dense(self.number, use_bias=False, name="router")(x))
        gate_up = self.param("gate_up", NORMAL, (self.number, width, 2, self.hidden))
        down = self.param("down", NORMAL, (self.number, self.hidden, width))
        fused = jnp.einsum("btd,edgf->btegf", x, gate_up)
        hidden = nn.silu(fused[..., 0, :]) * fused[..., 1, :]
        return x + jnp.einsum("btef,efd->btd", hidden * probabilities[..., None], down)
