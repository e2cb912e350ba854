"""A training loop of your own: batches, loss, optimizer and step are yours; the package adds the adapters.

python examples/own_loop.py [--steps 75]
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from stablelora_jax import (
    LoraSpec,
    adapted,
    base_directory,
    generate,
    init_adapters,
    load_pretrained,
    shrink_until_stable,
    still_shrinking,
)
from stablelora_jax.data.tasks.compare_sizes import questions

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=75)
arguments = parser.parse_args()

# The model, its frozen parameters, and the adapters: two trees of arrays.
model, params = load_pretrained(base_directory())
spec = LoraSpec(rank=8, alpha=16, target_modules="all-linear")
adapters, lora = init_adapters(jax.random.key(0), params, spec), adapted(model, spec)

# Data: integers (N, T), and which of them count in the loss. Here, the last tokens of each text: the answer.
rows = [(q.prompt, q.choices[q.label]) for q in questions("train")[:1024]]
encoded = model.tokenizer([prompt + answer for prompt, answer in rows], padding=True, return_tensors="np")
prompts = model.tokenizer([prompt for prompt, _ in rows], padding=True, return_tensors="np")
tokens, length = jnp.array(encoded.input_ids), encoded.attention_mask.shape[1]
prompt_lengths = prompts.attention_mask.sum(axis=1, keepdims=True)
loss_mask = jnp.array(encoded.attention_mask * (jnp.arange(length)[None] >= prompt_lengths))

# The optimizer: any optax transformation of the tree of adapters, and Stable-LoRA's shrink around it.
schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, 20, arguments.steps)
tx = shrink_until_stable(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), shrink_ratio=5e-4)
opt_state = tx.init(adapters)


@jax.jit
def step(adapters, opt_state, params, tokens, mask):
    """One update. ``params`` is an argument, so that it is not a constant of the compiled program."""

    def loss_fn(adapters):
        logits = lora.apply({"params": params, "lora": adapters}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()

    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, opt_state = tx.update(grads, opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state, loss


for number in range(1, arguments.steps + 1):
    chosen = jax.random.choice(jax.random.key(number), len(rows), (32,), replace=False)
    adapters, opt_state, loss = step(adapters, opt_state, params, tokens[chosen], loss_mask[chosen])
    if number % 25 == 0:
        print(f"step {number}: loss {loss:.3f}, {sum(still_shrinking(opt_state).values())} modules still shrink")

held_out = questions("validation")[:32]
results = generate(lora, {"params": params, "lora": adapters}, [q.prompt for q in held_out], max_new_tokens=8)
right = sum(r.text.startswith(q.choices[q.label]) for r, q in zip(results, held_out, strict=True))
print(f"{right} of {len(held_out)} held-out questions answered correctly")
