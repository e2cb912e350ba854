"""One step of training: many devices equal one, the base is untouched, one compilation, dropout by row."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import LoraSpec, adapted, init_adapters, stable_lora, tree
from stablelora_jax.adapter import pairs
from stablelora_jax.data import Example, make_batch
from stablelora_jax.losses import masked_cross_entropy
from stablelora_jax.parallel import first_copy, replicate, split_rows, stack_copies
from stablelora_jax.stability import stability
from stablelora_jax.train import init_state, make_stability_view, make_train_step
from tests.helpers import jit, largest_difference, tiny_decoder, trained

SPEC = LoraSpec(
    target="all-linear", rank=2, rank_pattern={"layers.1.self_attn.q_proj": 1}, exclude=["layers.0.mlp.up_proj"]
)


def batches(count=4, rows=8):
    rng = np.random.default_rng(0)
    make = lambda: [
        Example(tuple(map(int, rng.integers(0, 31, n))), int(rng.integers(1, n))) for n in rng.integers(3, 20, rows)
    ]
    return [make_batch(make()) for _ in range(count)]


def by_hand(model, params, spec, adapters, tx, steps):
    """The same training on one device, written plainly; no dropout."""
    state, losses = tx.init(adapters), []

    def loss(adapters, batch):
        logits = adapted(model, spec).apply({"params": params, "lora": adapters}, batch.tokens)
        total, count = masked_cross_entropy(logits, batch.tokens, batch.loss_mask)
        return total / count

    value_and_grad = jit(jax.value_and_grad(loss))
    for batch in steps:
        value, grads = value_and_grad(adapters, batch)
        updates, state = tx.update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        losses.append(float(value))
    return adapters, losses


def train(spec, tx, devices=None, steps=None):
    model, params = tiny_decoder()
    adapters = init_adapters(jax.random.key(0), params, spec)
    placed = replicate(params)
    state, step = stack_copies(init_state(adapters, tx, jax.random.key(1))), make_train_step(adapted(model, spec), tx)
    metrics = []
    for batch in steps or batches():
        state, m = step(state, placed, split_rows(batch))
        metrics.append(first_copy(m))
    return model, params, placed, adapters, state, metrics, step


STABLE = optax.chain(optax.clip_by_global_norm(1.0), stable_lora(1e-2, shrink_ratio=1e-2, weight_decay=0.1))


# Adam divides a gradient by its own size, and with it the rounding of one that is nearly zero: 1e-4 there
@pytest.mark.parametrize("tx,tolerance", [(optax.sgd(0.1), 1e-5), (STABLE, 1e-4)], ids=["sgd", "stable_lora"])
def test_eight_devices_equal_one_written_by_hand(tx, tolerance):
    model, params, placed, adapters, state, metrics, _ = train(SPEC, tx)
    assert jax.local_device_count() == 8
    expected, losses = by_hand(model, params, SPEC, adapters, tx, batches())
    assert largest_difference(first_copy(state).adapters, expected) < tolerance
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-5)
    assert int(first_copy(state).step) == 4 and np.isfinite([m["gradient_norm"] for m in metrics]).all()
    every = jax.tree.leaves(state.adapters)
    assert all(np.array_equal(leaf[0], leaf[i]) for leaf in every for i in range(8)), "copies must not drift apart"
    same = zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in jax.device_get(list(same))), "the base is frozen"


def test_compiles_once_and_counts_tokens(monkeypatch):
    from stablelora_jax import train as module

    monkeypatch.setattr(module, "masked_cross_entropy", chex.assert_max_traces(masked_cross_entropy, n=1))
    metrics = train(SPEC, stable_lora(1e-3))[5]
    assert [int(m["tokens"]) for m in metrics] == [int(b.segment_ids.sum()) for b in batches()]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_dropout_does_not_depend_on_the_devices(devices, monkeypatch):
    spec = LoraSpec(dropout=0.5)
    eight = train(spec, optax.sgd(0.1))
    few = jax.devices()[:devices]
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: few)
    monkeypatch.setattr(jax, "local_device_count", lambda *_, **__: devices)
    original = jax.pmap
    monkeypatch.setattr(jax, "pmap", lambda f, **k: original(f, devices=few, **k))
    less = train(spec, optax.sgd(0.1))
    assert largest_difference(first_copy(eight[4]).adapters, first_copy(less[4]).adapters) < 1e-5
    np.testing.assert_allclose([m["loss"] for m in eight[5]], [m["loss"] for m in less[5]], rtol=1e-5)


def test_dropout_changes_with_step_and_row():
    same = [batches(1)[0]] * 3
    losses = [float(m["loss"]) for m in train(LoraSpec(dropout=0.5), optax.sgd(0.0), steps=same)[5]]
    assert losses[0] == losses[1] == losses[2], "B = 0: dropout cannot act yet"
    losses = [float(m["loss"]) for m in train(LoraSpec(dropout=0.5), optax.sgd(1.0), steps=same)[5]]
    plain = [float(m["loss"]) for m in train(LoraSpec(), optax.sgd(1.0), steps=same)[5]]
    assert losses[0] == pytest.approx(plain[0], rel=1e-6) and losses[1:] != plain[1:]


def test_latches_and_norms_are_reported():
    from stablelora_jax import still_shrinking

    metrics = train(SPEC, stable_lora(1e-3))[5]
    latches = still_shrinking(metrics[0]["latches"])
    assert len(latches) == 3 * 7 - 1 and "model.layers.0.mlp.up_proj" not in latches and all(latches.values())
    assert metrics[0]["norm_a_min"] > 0 and metrics[0]["norm_b"] > 0
    assert train(SPEC, optax.sgd(0.1))[5][0]["latches"] == []


@pytest.mark.parametrize("tx,ratio", [(STABLE, 1e-2), (optax.adamw(1e-2), None)], ids=["stable_lora", "adamw"])
def test_the_stability_view_is_of_the_step_and_its_batch(tx, ratio):
    model, params = tiny_decoder()
    before = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    for path, pair in pairs(before).items():  # the second layer is stable at once
        sizes = np.array([0.1, 3, 0.1], np.float32)[:, None, None]
        before = tree.set_in(before, path, {**pair, "lora_b": sizes * pair["lora_b"]})
    placed, state, batch = replicate(params), stack_copies(init_state(before, tx, jax.random.key(1))), batches(1)[0]
    copy = jax.tree.map(jnp.copy, state.adapters)
    state, metrics = make_train_step(adapted(model, SPEC), tx)(state, placed, split_rows(batch))
    view = make_stability_view(adapted(model, SPEC), ratio)
    found = first_copy(view(copy, state.adapters, metrics["latches"], placed, split_rows(batch)))
    after, shrunk = first_copy(state).adapters, jax.tree.map(lambda x: x, before)
    for path, pair in pairs(before).items() if ratio else ():
        latch = np.asarray(tree.get_in(first_copy(metrics["latches"])[0].shrinking, path))
        assert set(latch.tolist()) >= {0, 1}
        kept = np.where(latch == 1, np.float32(1 - ratio), np.float32(1))[..., None, None]
        shrunk = tree.set_in(shrunk, path, {**pair, "lora_a": kept * pair["lora_a"]})
    variables, mask = {"params": params, "lora": before}, batch.segment_ids
    inputs = (batch.tokens, batch.positions, mask)
    expected = stability(adapted(model, SPEC), variables, shrunk, after, *inputs, token_mask=mask)
    assert found.keys() == expected.keys() and mask.min() == 0
    for path, terms in expected.items():
        for field, value in terms._asdict().items():
            np.testing.assert_allclose(getattr(found[path], field), value, rtol=1e-3, err_msg=f"{path} {field}")
    assert any(terms.shrink.any() for terms in expected.values()) == (ratio is not None)


def test_a_batch_without_loss_tokens_changes_nothing():
    batch = batches(1)[0]._replace(loss_mask=np.zeros((8, 32), np.int32))
    _, _, _, adapters, state, metrics, _ = train(LoraSpec(), optax.sgd(1.0), steps=[batch])
    assert metrics[0]["loss"] == 0 and largest_difference(first_copy(state).adapters, adapters) == 0


def test_rows_that_do_not_divide_are_refused():
    from stablelora_jax import InputError

    with pytest.raises(InputError, match="7 rows does not divide over 8"):
        split_rows({"x": jnp.ones((7, 2))})
