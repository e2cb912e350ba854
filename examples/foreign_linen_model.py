"""LoRA on a Linen model that knows nothing of LoRA: Embed, Conv, Dense and attention, adapted without a change to it.

python examples/foreign_linen_model.py [--steps 100]
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax import LoraSpec, adapted, describe, init_adapters, merge, stable_lora


class Classifier(nn.Module):
    """Token ids (B, T) to two logits (B, 2)."""

    @nn.compact
    def __call__(self, tokens):
        """Embedding, convolution, self-attention, mean, head."""
        x = nn.Embed(32, 24, name="embed")(tokens)
        x = nn.gelu(nn.Conv(24, (3,), name="conv")(x))
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x)
        return nn.Dense(2, name="head")(x.mean(axis=1))


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
arguments = parser.parse_args()

tokens = jnp.array(np.random.default_rng(0).integers(32, size=(64, 12)))
labels = (tokens[:, 0] > 15).astype(jnp.int32)  # what the adapters are to learn
model = Classifier()
params = model.init(jax.random.key(0), tokens)["params"]  # stands for pretrained parameters

# Names are the names of the modules. The head is new for this task, so it is trained in full.
spec = LoraSpec(rank=4, alpha=8, target_modules=["embed", "conv", "query", "value"], modules_to_save=["head"])
adapters, lora = init_adapters(jax.random.key(1), params, spec), adapted(model, spec)
print(describe(params, adapters, spec))

tx = stable_lora(learning_rate=1e-2, shrink_ratio=5e-4)
opt_state = tx.init(adapters)


@jax.jit
def step(adapters, opt_state, params):
    """One update of adapters and head."""

    def loss_fn(adapters):
        logits = lora.apply({"params": params, "lora": adapters}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, opt_state = tx.update(grads, opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state, loss


for _ in range(arguments.steps):
    adapters, opt_state, loss = step(adapters, opt_state, params)
logits = lora.apply({"params": params, "lora": adapters}, tokens)
print(f"loss {loss:.3f}, accuracy {(logits.argmax(axis=-1) == labels).mean():.2f}")
merged = model.apply({"params": merge(params, adapters, spec)}, tokens)  # the plain model, with merged parameters
print(f"largest difference after merging: {jnp.abs(merged - logits).max():.1e}")
