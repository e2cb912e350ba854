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
from stablelora_jax.parallel import mesh_layout, pmap_layout
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


def host(tree):
    return jax.tree.map(np.asarray, tree)


def train(spec, tx, layout=None, steps=None, **options):
    layout, (model, params) = layout or pmap_layout(), tiny_decoder()
    adapters = init_adapters(jax.random.key(0), params, spec)
    placed, state = layout.place_base(params), layout.state(host(init_state(adapters, tx, jax.random.key(1))))
    step, metrics = make_train_step(adapted(model, spec), tx, layout, **options), []
    for batch in steps or batches():
        state, m = step(state, placed, layout.split(batch))
        metrics.append(layout.fetch(m))
    return model, params, placed, adapters, state, metrics, layout


STABLE = optax.chain(optax.clip_by_global_norm(1.0), stable_lora(1e-2, shrink_ratio=1e-2, weight_decay=0.1))


# Adam divides a gradient by its own size, and with it the rounding of one that is nearly zero: 1e-4 there
@pytest.mark.parametrize("tx,tolerance", [(optax.sgd(0.1), 1e-5), (STABLE, 1e-4)], ids=["sgd", "stable_lora"])
def test_eight_devices_equal_one_written_by_hand(tx, tolerance):
    model, params, placed, adapters, state, metrics, layout = train(SPEC, tx)
    assert jax.local_device_count() == 8
    expected, losses = by_hand(model, params, SPEC, adapters, tx, batches())
    assert largest_difference(layout.fetch(state).adapters, expected) < tolerance
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-5)
    assert int(layout.fetch(state).step) == 4 and np.isfinite([m["gradient_norm"] for m in metrics]).all()
    every = jax.tree.leaves(state.adapters)
    assert all(np.array_equal(leaf[0], leaf[i]) for leaf in every for i in range(8)), "copies must not drift apart"
    same = zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in jax.device_get(list(same))), "the base is frozen"


def test_compiles_once_and_counts_tokens(monkeypatch):
    from stablelora_jax import train as module

    monkeypatch.setattr(module, "masked_cross_entropy", chex.assert_max_traces(masked_cross_entropy, n=1))
    metrics = train(SPEC, stable_lora(1e-3))[5]
    assert [int(m["tokens"]) for m in metrics] == [int(b.segment_ids.sum()) for b in batches()]


def test_dropout_changes_with_step_and_row():
    same = [batches(1)[0]] * 3
    losses = [float(m["loss"]) for m in train(LoraSpec(dropout=0.5), optax.sgd(0.0), steps=same)[5]]
    assert losses[0] == losses[1] == losses[2], "B = 0: dropout cannot act yet"
    losses = [float(m["loss"]) for m in train(LoraSpec(dropout=0.5), optax.sgd(1.0), steps=same)[5]]
    plain = [float(m["loss"]) for m in train(LoraSpec(), optax.sgd(1.0), steps=same)[5]]
    assert losses[0] == pytest.approx(plain[0], rel=1e-6) and losses[1:] != plain[1:]


def test_dropout_keys_fold_in_the_step_and_the_row():
    """States that differ in the step alone see other masks, and so do equal rows of one batch."""
    (model, params), layout, spec = tiny_decoder(), pmap_layout(), LoraSpec(dropout=0.5)
    adapters = trained(init_adapters(jax.random.key(0), params, spec), spec)
    step, tx = make_train_step(adapted(model, spec), optax.sgd(0.0), layout), optax.sgd(0.0)
    begun, placed, batch = host(init_state(adapters, tx, jax.random.key(1))), layout.place_base(params), batches(1)[0]
    loss = lambda at, b: layout.fetch(
        step(layout.state(begun._replace(step=np.int32(at))), placed, layout.split(b))[1]["loss"]
    )
    assert loss(3, batch) == loss(3, batch) != loss(4, batch)
    one = lambda i: jax.tree.map(
        lambda x: np.concatenate([np.roll(x[:1] * 0, 1, 0)] * i + [x[:1]] + [x[:1] * 0] * (7 - i)), batch
    )
    assert len({float(loss(3, one(i))) for i in range(8)}) == 8


def test_latches_and_norms_are_reported():
    from stablelora_jax import still_shrinking

    metrics = train(SPEC, stable_lora(1e-3))[5]
    latches = still_shrinking(metrics[0]["latches"])
    assert len(latches) == 3 * 7 - 1 and "model.layers.0.mlp.up_proj" not in latches and all(latches.values())
    assert metrics[0]["norm_a_min"] > 0 and metrics[0]["norm_b"] > 0
    assert train(SPEC, optax.sgd(0.1))[5][0]["latches"] == []


LAYOUTS = {"pmap": pmap_layout, "mesh": lambda: mesh_layout(2, 2, 2, key_value_heads=2)}


@pytest.mark.parametrize(
    "tx,ratio,where",
    [(STABLE, 1e-2, "pmap"), (optax.adamw(1e-2), None, "pmap"), (STABLE, 1e-2, "mesh")],
    ids=["stable_lora", "adamw", "mesh"],
)
def test_the_stability_view_is_of_the_step_and_its_batch(tx, ratio, where):
    model, params = tiny_decoder()
    before = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)
    for path, pair in pairs(before).items():  # the second layer is stable at once
        sizes = np.array([0.1, 3, 0.1], np.float32)[:, None, None]
        before = tree.set_in(before, path, {**pair, "lora_b": sizes * pair["lora_b"]})
    layout, batch = LAYOUTS[where](), batches(1)[0]
    placed, rows = layout.place_base(params), layout.split(batch)
    state = layout.state(host(init_state(before, tx, jax.random.key(1))))
    copy = jax.tree.map(jnp.copy, state.adapters)
    state, metrics = make_train_step(adapted(model, SPEC), tx, layout)(state, placed, rows)
    view = make_stability_view(adapted(model, SPEC), ratio, layout)
    found = layout.fetch(view(copy, state.adapters, metrics["latches"], placed, rows))
    after, shrunk = layout.fetch(state).adapters, jax.tree.map(lambda x: x, before)
    for path, pair in pairs(before).items() if ratio else ():
        latch = np.asarray(tree.get_in(layout.fetch(metrics["latches"])[0].shrinking, path))
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
    _, _, _, adapters, state, metrics, layout = train(LoraSpec(), optax.sgd(1.0), steps=[batch])
    assert metrics[0]["loss"] == 0 and largest_difference(layout.fetch(state).adapters, adapters) == 0


def test_rows_that_do_not_divide_are_refused():
    from stablelora_jax import InputError

    with pytest.raises(InputError, match="7 rows does not divide over 8 devices: batch_size must be a multiple of 8"):
        pmap_layout().require_rows(7)
    with pytest.raises(InputError, match="24 rows .* over a mesh of 4 .* in 4 micro-batches: .* a multiple of 32"):
        mesh_layout(4, 2).require_rows(24, 4)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    (model, params), layout = tiny_decoder(), pmap_layout()
    adapters = init_adapters(jax.random.key(0), params, SPEC)
    step = make_train_step(adapted(model, SPEC), STABLE, layout)
    damaged = tree.set_in(params, ("model", "norm", "scale"), params["model"]["norm"]["scale"] * jnp.nan)
    good, bad, rows = layout.place_base(params), layout.place_base(damaged), [layout.split(b) for b in batches()]

    def go(bases):
        state, found = layout.state(host(init_state(adapters, STABLE, jax.random.key(1)))), []
        for base, batch in bases:
            state, metrics = step(state, base, batch)
            found.append(layout.fetch(metrics))
        return layout.fetch(state), found

    state, found = go([(good, rows[0]), (bad, rows[1]), (bad, rows[2]), (good, rows[3])])
    without, _ = go([(good, rows[0]), (good, rows[3])])
    chex.assert_trees_all_equal((state.adapters, state.opt_state), (without.adapters, without.opt_state))
    assert [int(m["skipped"]) for m in found] == [0, 1, 1, 0] and [int(m["in_a_row"]) for m in found] == [0, 1, 2, 0]
    assert [int(m["applied"]) for m in found] == [0, 1, 1, 1] and (int(state.step), int(state.skipped)) == (4, 2)
    assert np.isnan(found[1]["loss"]) and np.isfinite(found[3]["loss"])


def test_an_update_that_is_not_finite_is_left_out():
    inner = optax.sgd(0.1)
    burst = optax.GradientTransformation(
        inner.init, lambda g, s, p: (jax.tree.map(lambda x: x * jnp.inf, inner.update(g, s, p)[0]), s)
    )
    _, _, _, adapters, state, metrics, layout = train(SPEC, burst)
    assert largest_difference(layout.fetch(state).adapters, adapters) == 0
    assert [int(m["in_a_row"]) for m in metrics] == [1, 2, 3, 4] and np.isfinite([m["loss"] for m in metrics]).all()
