"""QLoRA: adapters in float32 on a base whose kernels are NF4, 4.13 bits per weight (arXiv 2305.14314).

python examples/qlora.py [--steps 60] [--model DIRECTORY_OR_HUB_ID]

In a run, the same is one key: stablelora train model.quantize=nf4
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from stablelora_jax import (
    Batch,
    LoraSpec,
    adapted,
    base_directory,
    init_adapters,
    load_pretrained,
    stable_lora,
    summed_loss,
)
from stablelora_jax.data.tasks.compare_sizes import questions

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--model", default=base_directory())
arguments = parser.parse_args()


def kernel_bytes(params):
    """Bytes of the kernels of the layers."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params["model"]["layers"]))


_, full = load_pretrained(arguments.model)
model, params = load_pretrained(arguments.model, quantize="nf4")  # quantised tensor by tensor, as they are read
print(f"layers: {kernel_bytes(full):,} bytes in float32, {kernel_bytes(params):,} bytes in NF4")

# From here on nothing is special: a quantised kernel is a leaf that is dequantised one layer at a time.
spec = LoraSpec(rank=8, alpha=16, target_modules="all-linear")
adapters, lora = init_adapters(jax.random.key(0), params, spec), adapted(model, spec)
texts = [q.prompt + q.choices[q.label] for q in questions("train")[:32]]
encoded = model.tokenizer(texts, padding=True, return_tensors="np")
tokens, mask = jnp.array(encoded.input_ids), jnp.array(encoded.attention_mask)
positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
batch = Batch(tokens, loss_mask=mask, segment_ids=mask, positions=positions)

tx = stable_lora(learning_rate=5e-3, shrink_ratio=5e-4)
opt_state = tx.init(adapters)


@jax.jit
def step(adapters, opt_state, params, batch):
    """One update of the adapters; the loss is summed over tokens, without logits of shape (B, T, V)."""

    def loss_fn(adapters):
        return summed_loss(lora, {"params": params, "lora": adapters}, batch) / mask[:, 1:].sum()

    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, opt_state = tx.update(grads, opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state, loss


for number in range(1, arguments.steps + 1):
    adapters, opt_state, loss = step(adapters, opt_state, params, batch)
    if number == 1 or number % 20 == 0:
        print(f"step {number}: loss {loss:.3f}")
