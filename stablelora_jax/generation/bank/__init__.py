"""Many adapters in one batch: each row uses its own adapter, and replacing one compiles nothing.

A bank stacks adapters, padded to common modules and a common rank, on a new leading axis; the last is zeros, which is
the base model. A batch gathers the adapters of its rows, and ``jax.vmap`` runs the rows: a kernel of the base has no
row axis and stays one matrix product for all of them, while the low-rank path becomes a batched one. Each adapter has
its own scale, an array like the pairs. ::

    bank = make_bank(params, [(french, french_spec), (german, german_spec)], size=8)
    logits = banked(model).apply({"params": params, "bank": bank, "rows": jnp.array([0, 1, -1])}, tokens)
    bank = replace_adapter(bank, 1, spanish, spanish_spec)

The rows' adapters are gathered before the model runs: B rows need memory for B adapters beside the bank.
"""

from stablelora_jax.generation.bank.held import Bank, make_bank, replace_adapter
from stablelora_jax.generation.bank.rows import Banked, banked

__all__ = ["Bank", "Banked", "banked", "make_bank", "replace_adapter"]
