"""An adapter of its own for each row: as each row alone with its adapter, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, adapted, init_adapters, lora_hyperparams
from tests.helpers import ForeignMLP, jit, largest_difference, long, random_params, tiny_decoder, tokens, trained

ROWS = np.array([2, 0, 0, 1, 2], np.int32)
CASES = {
    "lora": (LoraSpec(target_modules="all-linear", rank=2), {}),
    "dora": (LoraSpec(target_modules=("q_proj", "down_proj"), rank=2, parametrization="dora"), {}),
    "tied": (LoraSpec(target_modules=("v_proj", "embed_tokens"), rank=2), {"tie_word_embeddings": True}),
    "layers": (LoraSpec(target_modules="all-linear", rank=2, layers_to_transform=(1,), lora_bias=True), {}),
}
QUIET = (("dora", "tied", "layers"), (0.0, 0.0, 0.0))  # with a key one of three adapters drops nothing, too
stack = lambda trees: jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *trees)  # NumPy compiles nothing


def adapters_of(params, spec):
    made = [trained(init_adapters(jax.random.key(i), params, spec), spec, seed=i) for i in range(3)]
    numbers = [jax.tree.map(lambda x, i=i: x * (1 + i / 4), lora_hyperparams(spec, one)) for i, one in enumerate(made)]
    return made, numbers


def each_alone(model, params, made, numbers, rows, inputs, keys):
    """The outputs of the rows, one after another, and the gradients of the sum of their squares by adapter."""

    def loss(adapters, numbers, row, key):
        rngs = None if key is None else {"dropout": key}
        out = model.apply({"params": params, "lora": adapters, "lora_hp": numbers}, row, rngs=rngs)
        return (out**2).sum(), out

    of_row = jit(jax.grad(loss, has_aux=True))  # one program for all rows
    found, gradients = [], [jax.tree.map(np.zeros_like, one) for one in made]
    for at, row in enumerate(rows):
        key = None if keys is None else keys[at : at + 1]
        gradient, out = of_row(made[row], numbers[row], inputs[at : at + 1], key)
        gradients[row] = jax.tree.map(lambda a, b: a + np.asarray(b), gradients[row], gradient)
        found.append(out)
    return np.concatenate(found), gradients


@pytest.mark.parametrize("name, dropout", [*((name, 0.4) for name in CASES), ("lora", 0.0), *map(long, *QUIET)])
def test_rows_are_as_each_alone(name, dropout):
    spec, options = CASES[name]
    model, params = tiny_decoder(**options)
    made, numbers = adapters_of(params, spec)
    numbers = [jax.tree_util.tree_map_with_path(
        lambda path, x, rate=rate: np.full_like(x, rate) if "dropout" in str(path) else x, one)
        for one, rate in zip(numbers, (0.0, dropout, dropout / 2), strict=True)]  # fmt: skip
    keys = jax.random.split(jax.random.key(4), len(ROWS)) if dropout else None
    low_rank, inputs = adapted(model, spec), tokens(len(ROWS))
    expected, wanted = each_alone(low_rank, params, made, numbers, ROWS, inputs, keys)

    def loss(adapters):
        variables = {"params": params, "lora": adapters, "lora_hp": stack(numbers), "lora_rows": ROWS}
        out = low_rank.apply(variables, inputs, rngs=None if keys is None else {"dropout": keys})
        return (out**2).sum(), out

    found, out = jit(jax.grad(loss, has_aux=True))(stack(made))
    assert largest_difference(out, expected) < 1e-5
    assert largest_difference(found, stack(wanted)) < 1e-5


def test_a_foreign_model_and_scales_of_the_spec():
    model, x = ForeignMLP(), jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    params, spec = random_params(model, x), LoraSpec(target_modules="all-linear", rank=2, in_axes={"join": (0, 1)})
    made, _ = adapters_of(params, spec)
    low_rank = adapted(model, spec)
    out = jit(low_rank.apply)({"params": params, "lora": stack(made), "lora_rows": ROWS}, x)
    of_row = jit(lambda adapters, x: low_rank.apply({"params": params, "lora": adapters}, x))
    alone = [of_row(made[row], x[i : i + 1]) for i, row in enumerate(ROWS)]
    assert largest_difference(out, np.concatenate(alone)) < 1e-5


def test_training_leaves_absent_adapters_and_unused_ranks_as_they_are():
    """The laws of SkyRL-tx's ``tests/models/test_llama3_lora_training.py``, to the bit."""
    model, params = tiny_decoder()
    rank, ranks = 4, (4, 2, 3)
    specs = [LoraSpec(rank=own, alpha=own) for own in ranks]
    made = [init_adapters(jax.random.key(i), params, spec) for i, spec in enumerate(specs)]
    wide = lambda path, x: jnp.pad(x, [(0, rank - n) if n in ranks and axis == _rank_axis(path) else (0, 0)
                                       for axis, n in zip(range(-x.ndim, 0), x.shape, strict=True)])  # fmt: skip
    begun = stack([jax.tree_util.tree_map_with_path(wide, one) for one in made])
    spec = LoraSpec(rank=rank, alpha=rank)
    low_rank, inputs, tx = adapted(model, spec), tokens(2, 10), optax.adam(0.05)

    def loss(adapters):
        variables = {"params": params, "lora": adapters, "lora_rows": jnp.array([0, 1])}
        logits = low_rank.apply(variables, inputs[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, inputs[:, 1:]).mean()

    @jax.jit
    def step(adapters, state):
        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, value

    adapters, state, losses = begun, tx.init(begun), []
    for _ in range(10):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.1
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(begun), jax.tree.leaves(adapters), strict=True
    ):
        np.testing.assert_array_equal(after[2], before[2])
        beyond = jax.lax.slice_in_dim(after[1], ranks[1], rank, axis=after[1].ndim + _rank_axis(path))
        assert not np.any(beyond) and np.any(after[1] != before[1]) and np.any(after[0] != before[0])


def _rank_axis(path):
    return -1 if path[-1].key == "lora_a" else -2


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
