"""Many adapters on one base: a batch whose rows use different adapters, an exchange without recompilation, a mixture.

python examples/many_adapters.py [--steps 60]
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from stablelora_jax import (
    LoraSpec,
    adapted,
    banked,
    base_directory,
    combine,
    generate,
    init_adapters,
    load_pretrained,
    make_bank,
    replace_adapter,
    stable_lora,
)

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
arguments = parser.parse_args()
model, params = load_pretrained(base_directory())


def train(sentences, rank):
    """Adapters of their own rank that know these sentences, and their spec."""
    spec = LoraSpec(rank=rank, alpha=2 * rank, target_modules="all-linear")
    adapters, lora = init_adapters(jax.random.key(rank), params, spec), adapted(model, spec)
    encoded = model.tokenizer([s + model.tokenizer.eos_token for s in sentences], padding=True, return_tensors="np")
    tokens, mask = jnp.array(encoded.input_ids), jnp.array(encoded.attention_mask)
    tx = stable_lora(learning_rate=5e-3)

    @jax.jit
    def step(adapters, opt_state):
        def loss_fn(adapters):
            logits = lora.apply({"params": params, "lora": adapters}, tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()

        updates, opt_state = tx.update(jax.grad(loss_fn)(adapters), opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state

    opt_state = tx.init(adapters)
    for _ in range(arguments.steps):
        adapters, opt_state = step(adapters, opt_state)
    return adapters, spec


pets = train(["The cat is a pet.", "The dog is a pet."], rank=4)
wild = train(["The lion is wild.", "The bear is wild."], rank=8)

# Row i of the batch uses adapter rows[i]; -1 is the base alone. Ranks may differ.
bank = make_bank(params, [pets, wild], size=4)
prompts = ["The cat", "The lion", "The lion"]
variables = {"params": params, "bank": bank, "rows": jnp.array([0, 1, -1])}
for result in generate(banked(model), variables, prompts, max_new_tokens=8):
    print(result.text)

bank = replace_adapter(bank, 0, *wild)  # the same shapes: what is compiled stays
both, spec = combine([pets, wild], [0.5, 0.5], "cat")  # half of each change, exactly, as one adapter
print(f"the mixture has rank {spec.rank}")
