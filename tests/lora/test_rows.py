"""An adapter of its own for each row: as each row alone with its adapter, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, lora_hyperparams
from tests.helpers import ForeignMLP, largest_difference, random_params, tiny_decoder, tokens, trained

ROWS = np.array([2, 0, 0, 1, 2], np.int32)
CASES = {
    "lora": (LoraSpec(target_modules="all-linear", rank=2), {}),
    "dora": (LoraSpec(target_modules=("q_proj", "down_proj"), rank=2, parametrization="dora"), {}),
    "tied": (LoraSpec(target_modules=("v_proj", "embed_tokens"), rank=2), {"tie_word_embeddings": True}),
    "layers": (LoraSpec(target_modules="all-linear", rank=2, layers_to_transform=(1,), lora_bias=True), {}),
}
stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)


def adapters_of(params, spec):
    made = [trained(init_adapters(jax.random.key(i), params, spec), spec, seed=i) for i in range(3)]
    numbers = [jax.tree.map(lambda x, i=i: x * (1 + i / 4), lora_hyperparams(spec, one)) for i, one in enumerate(made)]
    return made, numbers


def each_alone(model, params, made, numbers, rows, inputs, keys):
    """The outputs of the rows, one after another, and the gradients of the sum of their squares by adapter."""

    def loss(adapters):
        found = []
        for at, row in enumerate(rows):
            rngs = None if keys is None else {"dropout": keys[at : at + 1]}
            variables = {"params": params, "lora": adapters[row], "lora_hp": numbers[row]}
            found.append(model.apply(variables, inputs[at : at + 1], rngs=rngs))
        whole = jnp.concatenate(found)
        return (whole**2).sum(), whole

    return jax.value_and_grad(loss, has_aux=True)(made)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_as_each_alone(name, dropout):
    spec, options = CASES[name]
    model, params = tiny_decoder(**options)
    made, numbers = adapters_of(params, spec)
    numbers = [jax.tree_util.tree_map_with_path(
        lambda path, x, rate=rate: jnp.full_like(x, rate) if "dropout" in str(path) else x, one)
        for one, rate in zip(numbers, (0.0, dropout, dropout / 2), strict=True)]  # fmt: skip
    keys = jax.random.split(jax.random.key(4), len(ROWS)) if dropout else None
    low_rank, inputs = adapted(model, spec), tokens(len(ROWS))
    (_, expected), wanted = each_alone(low_rank, params, made, numbers, ROWS, inputs, keys)

    def loss(adapters):
        variables = {"params": params, "lora": adapters, "lora_hp": stack(numbers), "lora_rows": ROWS}
        out = low_rank.apply(variables, inputs, rngs=None if keys is None else {"dropout": keys})
        return (out**2).sum(), out

    (_, out), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(stack(made))
    assert largest_difference(out, expected) < 1e-5
    assert largest_difference(found, stack(wanted)) < 1e-5


def test_a_foreign_model_and_scales_of_the_spec():
    model, x = ForeignMLP(), jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    params, spec = random_params(model, x), LoraSpec(target_modules="all-linear", rank=2, in_axes={"join": (0, 1)})
    made, _ = adapters_of(params, spec)
    low_rank = adapted(model, spec)
    out = low_rank.apply({"params": params, "lora": stack(made), "lora_rows": ROWS}, x)
    alone = [low_rank.apply({"params": params, "lora": made[row]}, x[i : i + 1]) for i, row in enumerate(ROWS)]
    assert largest_difference(out, jnp.concatenate(alone)) < 1e-5


def test_mistakes():
    model, params = tiny_decoder()
    spec = LoraSpec(target_modules=("q_proj",), rank=2)
    made, _ = adapters_of(params, spec)
    apply = lambda rows, lora=None: adapted(model, spec).apply(
        {"params": params, "lora": stack(made) if lora is None else lora, "lora_rows": rows}, tokens(5)
    )
    with pytest.raises(InputError, match=r"lora_rows must be whole numbers, one for each row, not float"):
        apply(np.ones(5))
    with pytest.raises(InputError, match="3 lora_rows for an input of"):
        apply(np.zeros(3, np.int32))
    with pytest.raises(InputError, match="the kernel is|do not make a pair|the first axis of all leaves"):
        apply(ROWS, made[0])
