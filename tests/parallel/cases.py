"""A small decoder that eight devices can split in every way, its batches, and the layouts that must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax import LoraSpec, adapted, init_adapters, stable_lora
from stablelora_jax.data import Example, make_batch
from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.training.step import init_state, make_train_step
from tests.helpers import tiny_decoder

SHAPE = dict(
    vocab_size=352,
    hidden_size=64,
    intermediate_size=144,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
)
HEADS = SHAPE["num_key_value_heads"]
LAYOUTS = {
    "one device": lambda: (pmap_layout(jax.devices()[:1]), 1),
    "pmap 2": lambda: (pmap_layout(jax.devices()[:2]), 1),
    "pmap 4": lambda: (pmap_layout(jax.devices()[:4]), 1),
    "pmap 8": lambda: (pmap_layout(), 1),
    "pmap 4, 2 micro-batches": lambda: (pmap_layout(jax.devices()[:4]), 2),
    "mesh 8 1 1": lambda: (mesh_layout(8, 1, 1, key_value_heads=HEADS), 1),
    "mesh 2 4 1": lambda: (mesh_layout(2, 4, 1, key_value_heads=HEADS), 1),
    "mesh 2 2 2": lambda: (mesh_layout(2, 2, 2, key_value_heads=HEADS), 1),
    "mesh 1 1 8": lambda: (mesh_layout(1, 1, 8, key_value_heads=HEADS), 1),
    "mesh 2 2 2, 4 micro-batches": lambda: (mesh_layout(2, 2, 2, key_value_heads=HEADS), 4),
}
TX = optax.chain(optax.clip_by_global_norm(1.0), stable_lora(1e-2, shrink_ratio=1e-2, weight_decay=0.1))


HALF = 4  # of the steps of a test, after which a checkpoint is made


def batches(count=2 * HALF, rows=16):
    """Rows of uneven length, with pads, so that every part has another number of loss tokens."""
    rng = np.random.default_rng(0)

    def example():
        n = int(rng.integers(3, 30))
        return Example(tuple(map(int, rng.integers(0, 352, n))), int(rng.integers(1, n)))

    return [make_batch([example() for _ in range(rows)]) for _ in range(count)]


def problem(dtype, dropout, tx=TX, spec=None, **shape):
    """``(model, params, the start as host arrays)``."""
    model, params = tiny_decoder(dtype, **{**SHAPE, **shape})
    spec = spec or LoraSpec(target_modules="all-linear", rank=2, dropout=dropout)
    adapters = init_adapters(jax.random.key(0), params, spec, dtype=dtype)
    start = jax.tree.map(np.asarray, init_state(adapters, tx, jax.random.key(1)))
    return adapted(model, spec), params, start


def go(step, layout, params, state, given):
    """Steps over ``given``: ``(the last state as host arrays, losses)``; ``params`` are placed."""
    placed, losses = layout.place_state(state), []
    for batch in given:
        placed, metrics = step(placed, params, layout.split(batch))
        losses.append(float(layout.fetch(metrics)["loss"]))
    return layout.fetch(placed), np.array(losses)


def make(name, model, params, tx=TX):
    """``(layout, step, params as placed)`` of one of :data:`LAYOUTS`."""
    layout, accumulate = LAYOUTS[name]()
    return layout, make_train_step(model, tx, layout, accumulate=accumulate), layout.place_base(params)


DTYPES = {"float32": (jnp.float32, 1e-4), "float64": (jnp.float64, 1e-9)}
