"""One step of training: many devices equal one, the base is untouched, one compilation, dropout by row."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import LoraSpec, adapted, init_adapters, split_frozen, stable_lora, with_frozen
from stablelora_jax.data import Batch, Example, make_batch, pack
from stablelora_jax.data.batch import positions_of_mask
from stablelora_jax.lora.leaves import trains_pairs
from stablelora_jax.lora.pairs import pairs
from stablelora_jax.models.decoder import head_path
from stablelora_jax.parallel import mesh_layout, pmap_layout
from stablelora_jax.quantization import dequantize_tree, quantize_params
from stablelora_jax.training.cross_entropy import token_log_probs
from stablelora_jax.training.loss import completion_log_probs, summed_loss
from stablelora_jax.training.stability import stability
from stablelora_jax.training.step import init_state, make_stability_view, make_train_step
from stablelora_jax.utils import tree
from tests.helpers import jit, largest_difference, long, soak, tiny_decoder, trained
from tests.training.oracles import masked_cross_entropy

SPEC = LoraSpec(
    target_modules="all-linear",
    rank=2,
    rank_pattern={"layers.1.self_attn.q_proj": 1},
    exclude_modules=["layers.0.mlp.up_proj"],
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
    placed, state = layout.place_base(params), layout.place_state(host(init_state(adapters, tx, jax.random.key(1))))
    step, metrics = make_train_step(adapted(model, spec), tx, layout, **options), []
    for batch in steps or batches():
        state, m = step(state, placed, layout.split(batch))
        metrics.append(layout.fetch(m))
    return model, params, placed, adapters, state, metrics, layout


STABLE = optax.chain(optax.clip_by_global_norm(1.0), stable_lora(1e-2, shrink_ratio=1e-2, weight_decay=0.1))


# Adam divides a gradient by its own size, and with it the rounding of one that is nearly zero: 1e-4 there
@pytest.mark.parametrize("tx,tolerance", [long(optax.sgd(0.1), 1e-5), (STABLE, 1e-4)], ids=["sgd", "stable_lora"])
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


def test_compiles_once_counts_tokens_and_reports_latches_and_norms(monkeypatch):
    from stablelora_jax import still_shrinking
    from stablelora_jax.training import objective as module

    monkeypatch.setattr(module, "summed_loss", chex.assert_max_traces(module.summed_loss, n=1))
    metrics = train(SPEC, stable_lora(1e-3))[5]
    assert [int(m["tokens"]) for m in metrics] == [int(b.segment_ids.sum()) for b in batches()]
    latches = still_shrinking(metrics[0]["latches"])
    assert len(latches) == 3 * 7 - 1 and "model.layers.0.mlp.up_proj" not in latches and all(latches.values())
    assert metrics[0]["norm_a_min"] > 0 and metrics[0]["norm_b"] > 0


def test_without_latches_there_are_none():
    assert train(SPEC, optax.sgd(0.1), steps=batches(1))[5][0]["latches"] == []


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
        step(layout.place_state(begun._replace(step=np.int32(at))), placed, layout.split(b))[1]["loss"]
    )
    assert loss(3, batch) == loss(3, batch) != loss(4, batch)
    one = lambda i: jax.tree.map(
        lambda x: np.concatenate([np.roll(x[:1] * 0, 1, 0)] * i + [x[:1]] + [x[:1] * 0] * (7 - i)), batch
    )
    assert len({float(loss(3, one(i))) for i in range(8)}) == 8


LAYOUTS = {"pmap": pmap_layout, "mesh": lambda: mesh_layout(2, 2, 2, key_value_heads=2)}


@pytest.mark.parametrize(
    "tx,ratio,where",
    [(STABLE, 1e-2, "pmap"), long(optax.adamw(1e-2), None, "pmap"), long(STABLE, 1e-2, "mesh")],
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
    state = layout.place_state(host(init_state(before, tx, jax.random.key(1))))
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
        state, found = layout.place_state(host(init_state(adapters, STABLE, jax.random.key(1)))), []
        for base, batch in bases:
            state, metrics = step(state, base, batch)
            found.append(layout.fetch(metrics))
        return layout.fetch(state), found

    state, found = go([(good, rows[0]), (bad, rows[1]), (bad, rows[2]), (good, rows[3])])
    without, _ = go([(good, rows[0]), (good, rows[3])])
    chex.assert_trees_all_equal((state.adapters, state.opt_state), (without.adapters, without.opt_state))
    assert [int(m["skipped"]) for m in found] == [0, 1, 1, 0] and [int(m["consecutive_skips"]) for m in found] == [
        0,
        1,
        2,
        0,
    ]
    assert [int(m["applied"]) for m in found] == [0, 1, 1, 1] and (int(state.step), int(state.skipped)) == (4, 2)
    assert np.isnan(found[1]["loss"]) and np.isfinite(found[3]["loss"])


def test_an_update_that_is_not_finite_is_left_out():
    inner = optax.sgd(0.1)
    burst = optax.GradientTransformation(
        inner.init, lambda g, s, p: (jax.tree.map(lambda x: x * jnp.inf, inner.update(g, s, p)[0]), s)
    )
    _, _, _, adapters, state, metrics, layout = train(SPEC, burst)
    assert largest_difference(layout.fetch(state).adapters, adapters) == 0
    assert [int(m["consecutive_skips"]) for m in metrics] == [1, 2, 3, 4] and np.isfinite(
        [m["loss"] for m in metrics]
    ).all()


def packed_batches():
    """Rows of 32 with two to four texts each."""
    rng = np.random.default_rng(4)
    text = lambda n: Example(tuple(map(int, rng.integers(0, 31, n))), int(rng.integers(0, n - 1)))
    return [pack([[text(int(n)) for n in rng.integers(3, 9, rng.integers(2, 5))] for _ in range(8)], 32)]


def with_places(batch, learnt):
    return batch._replace(loss_positions=positions_of_mask(batch.loss_mask, learnt))


@pytest.mark.parametrize(
    "layout,accumulate,make",
    [long("pmap", 1, lambda: batches(1)), long("pmap", 1, packed_batches), ("mesh", 2, packed_batches)],
    ids=["pmap-bucket", "pmap-pack", "mesh-pack-micro"],
)
def test_the_places_of_learnt_tokens_change_nothing(layout, accumulate, make):
    """The loss at the learnt places alone is the loss over all logits, and so is its gradient."""
    (batch,) = make()
    (model, params), tx = tiny_decoder(), optax.sgd(1.0)
    begun = trained(init_adapters(jax.random.key(0), params, SPEC), SPEC)

    def loss(adapters):
        variables = {"params": params, "lora": adapters}
        logits = adapted(model, SPEC).apply(variables, batch.tokens, batch.positions, batch.segment_ids)
        total, count = masked_cross_entropy(logits, batch.tokens, batch.loss_mask)
        return total / count

    value, gradient = jit(jax.value_and_grad(loss))(begun)
    place = LAYOUTS[layout]()
    step = make_train_step(adapted(model, SPEC), tx, place, accumulate=accumulate)
    placed, state = place.place_base(params), place.place_state(host(init_state(begun, tx, jax.random.key(1))))
    state, metrics = step(state, placed, place.split(with_places(batch, 31)))
    assert metrics["loss_tokens"].ravel()[0] == batch.loss_mask[:, 1:].sum()
    np.testing.assert_allclose(place.fetch(metrics)["loss"], value, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: a - b, begun, place.fetch(state).adapters)
    assert largest_difference(moved, gradient) < 1e-5
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3


def test_the_loss_of_a_base_without_adapters():
    """What ``Adapted.apply`` takes as the base's is its loss, too."""
    (batch,), (model, params) = batches(1), tiny_decoder()
    found = jit(lambda p: summed_loss(adapted(model, SPEC), {"params": p}, batch))(params)
    logits = model.apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids)
    np.testing.assert_allclose(found, masked_cross_entropy(logits, batch.tokens, batch.loss_mask)[0], rtol=1e-6)


EVERY = LoraSpec(target_modules="all-linear", rank=2)
HALVES = {
    "lora": (EVERY, {}),
    "blocks": (EVERY, {"attention": "blockwise"}),
    "nothing kept": (EVERY, {"remat": "nothing", "attention": "blockwise"}),
    "packed": (EVERY, {"segments": 2}),
    "dora": (replace(EVERY, parametrization="dora"), {}),
    "head": (LoraSpec(target_modules=["lm_head", "v_proj"], rank=2, modules_to_save=["embed_tokens"]), {}),
    "nf4": (EVERY, {}),
    "int8": (EVERY, {"attention": "blockwise"}),
}


MESHED = ("lora", "packed", "dora", "head")  # quantised bases are not split, and the rest is split as lora is


SHORT = (("dora", "mesh"),)
FURTHER = (("nf4", "pmap"), ("blocks", "pmap"), ("head", "mesh"))
HALF = [*((name, "pmap") for name in HALVES), *((name, "mesh") for name in MESHED)]
TIERS = [one if one in SHORT else (long if one in FURTHER else soak)(*one) for one in HALF]


@pytest.mark.parametrize("name, layout", TIERS)
def test_a_step_in_bfloat16_runs_and_is_near_that_in_float32(name, layout):
    """Compiled and taken: XLA's CPU lacks some products of bfloat16, which no look at a program shows."""
    spec, options = HALVES[name]
    model, params = tiny_decoder(jnp.bfloat16)
    params = quantize_params(params, name) if name in ("nf4", "int8") else params
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), dequantize_tree(params))
    place = LAYOUTS[layout]()
    (batch,), begun, moved = batches(1), trained(init_adapters(jax.random.key(0), params, spec), spec), []
    for own, base in ((model.clone(dtype=jnp.float32), widened), (model, params)):
        step = make_train_step(adapted(own.clone(**options), spec), optax.sgd(1.0), place)
        state = place.place_state(host(init_state(begun, optax.sgd(1.0), jax.random.key(1))))
        state, metrics = step(state, place.place_base(base), place.split(with_places(batch, 31)))
        after = place.fetch(state).adapters
        moved.append((jax.tree.map(lambda a, b: np.asarray(a) - b, after, begun), place.fetch(metrics)["loss"]))
    (exact, loss), (found, half) = moved
    assert half == pytest.approx(loss, rel=0.02)
    assert optax.tree.norm(optax.tree.sub(found, exact)) < 0.1 * optax.tree.norm(exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}


HEADS = {
    "alone": ({}, LoraSpec(target_modules=["lm_head"], rank=2)),
    "untied": ({}, LoraSpec(target_modules=["lm_head", "v_proj"], rank=2)),
    "dora": ({}, LoraSpec(target_modules=["lm_head", "v_proj"], rank=2, parametrization="dora")),
    "shared": (
        {},
        LoraSpec(
            target_modules=["lm_head", "v_proj"],
            rank=2,
            parametrization="vblora",
            options={"vectors": 6, "length": 1},
        ),
    ),
    "one vector": (
        {},
        LoraSpec(target_modules=["lm_head", "v_proj"], rank=2, parametrization="unilora", options={"length": 24}),
    ),
    "tied": ({"tie_word_embeddings": True}, LoraSpec(target_modules=["embed_tokens", "v_proj"], rank=2)),
    "saved": ({}, LoraSpec(target_modules=["v_proj"], rank=2, modules_to_save=["lm_head"])),
    "saved_tied": (
        {"tie_word_embeddings": True},
        LoraSpec(target_modules=["v_proj"], rank=2, modules_to_save=["embed_tokens"]),
    ),
}


def head_problem(changes, spec, rows):
    """``(adapted model, variables of the trained leaves, these, batch)`` in float64, of rows of 16 tokens."""
    model, params = tiny_decoder(jnp.float64, num_hidden_layers=1, **changes)
    begun, frozen = split_frozen(init_adapters(jax.random.key(0), params, spec, dtype=jnp.float64))
    begun = trained(begun, spec) if trains_pairs(spec) else jax.tree.map(lambda x: 20 * x, begun)
    rng = np.random.default_rng(2)
    made = make_batch([Example(tuple(map(int, rng.integers(0, 31, 16))), 1 + 5 * i) for i in range(rows)])
    batch = with_places(jax.tree.map(lambda x: x[:, :16], made), 15)
    return adapted(model, spec), lambda own: {"params": params, "lora": with_frozen(own, frozen)}, begun, batch


def head_case(name, dropout=0.0):
    """``(tiled loss, loss over all logits, adapters)``, of 2 rows in 8 tiles; the head is trained."""
    changes, spec = HEADS[name]
    low_rank, variables, begun, batch = head_problem(changes, replace(spec, dropout=dropout), 2)

    def plain(adapters):
        logits = low_rank.apply(variables(adapters), batch.tokens, batch.positions, batch.segment_ids)
        return masked_cross_entropy(logits, batch.tokens, batch.loss_mask)[0]

    def tiled(adapters, key=None, places=True):
        keys = None if key is None else jax.random.split(key, 2)
        given = batch if places else batch._replace(loss_positions=None)
        return summed_loss(low_rank, variables(adapters), given, keys)

    return tiled, plain, begun


@pytest.mark.parametrize("name", HEADS)
def test_an_adapted_head_learns_as_over_all_logits(name, x64):
    tiled, plain, adapters = head_case(name)
    (value, found), (total, expected) = (jit(jax.value_and_grad(f))(adapters) for f in (tiled, plain))
    np.testing.assert_allclose(value, total, rtol=1e-10)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)
    head = tree.get_in(expected, head_path(tiny_decoder(**HEADS[name][0])[0].config))
    leaves = jax.tree.leaves([head, expected.get("lora_shared", {})])
    assert min(float(np.abs(g).max()) for g in leaves) > 1e-2


@pytest.mark.parametrize("name", ["none", "shared", *(long(name) for name in HEADS if name != "shared")])
def test_log_probs_of_completions_are_those_of_all_logits(name, x64):
    """Each with a weight of its own in the loss, so that each has a gradient of its own."""
    changes, spec = HEADS.get(name, ({}, LoraSpec(rank=2)))
    lora, variables, begun, batch = head_problem(changes, spec, 3)

    def tiled(adapters):
        return completion_log_probs(lora, variables(adapters), batch)

    def plain(adapters):
        logits = lora.apply(variables(adapters), batch.tokens, batch.positions, batch.segment_ids)
        return (token_log_probs(logits, batch.tokens) * batch.loss_mask).sum(axis=1)

    weigh = lambda log_probs: jnp.tanh(log_probs / 30) @ jnp.array([1.0, -2.0, 3.0])
    (value, found), (total, expected) = (
        jit(jax.value_and_grad(lambda a, f=f: weigh(f(a))))(begun) for f in (tiled, plain)
    )
    np.testing.assert_allclose(value, total, rtol=1e-10)
    np.testing.assert_allclose(tiled(begun), plain(begun), rtol=1e-10)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["untied", "dora"])
def test_an_adapted_head_with_dropout_learns_what_it_computes(name, x64):
    tiled, _, adapters = head_case(name, 0.4)
    loss = jit(jax.value_and_grad(tiled))
    (value, gradient), (again, _), (other, _) = (loss(adapters, jax.random.key(k)) for k in (0, 0, 1))
    assert value == again != other and np.isfinite(value)
    rng = np.random.default_rng(6)
    way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), adapters)
    if name == "dora":  # its norms are constants to the gradient, not to a difference
        still = lambda path, x: x if path[-1].key == "lora_magnitude_vector" else x * 0
        way = jax.tree_util.tree_map_with_path(still, way)
    at = lambda h: loss(jax.tree.map(lambda x, d: x + h * d, adapters, way), jax.random.key(0))[0]
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, slope, rtol=1e-6)
    head = gradient["lm_head"]
    assert min(float(np.abs(g).max()) for g in jax.tree.leaves(head)) > 1e-3


@pytest.mark.long
def test_an_adapted_head_drops_by_token(monkeypatch, x64):
    """Tiles may be longer where there are more devices, and other places learnt: the loss must not know of it."""
    tiled, _, adapters = head_case("untied", 0.4)
    assert np.isfinite(tiled(adapters, jax.random.key(0, impl="rbg"))), "keys of any kind"
    key = jax.random.key(0)
    run = lambda places: jit(lambda adapters: jax.value_and_grad(tiled)(adapters, key, places))(adapters)
    expected = run(True)
    for length in (1, 4, 15):
        monkeypatch.setattr("stablelora_jax.training.loss.chunk_length", lambda *args, length=length: length)
        for places in (True, False):
            chex.assert_trees_all_close(run(places), expected, rtol=1e-12, atol=1e-12)


def test_tokens_of_an_adapted_head_drop_differently(x64):
    """Equal tokens of a row see other masks: else dropout would act on a tile, or a row, and not on tokens."""
    spec = replace(HEADS["untied"][1], dropout=0.5)
    model, params = tiny_decoder(jnp.float64, num_hidden_layers=1)
    adapters = trained(init_adapters(jax.random.key(0), params, spec, dtype=jnp.float64), spec)
    adapters["model"] = jax.tree.map(lambda x: x * 0, adapters["model"])
    ones, keys = np.ones((1, 16), np.int32), jax.random.split(jax.random.key(0), 1)

    def loss(place):
        """Of one token of equal ones; all others count for nothing."""
        batch = Batch(3 * ones, ones, ones, ones, jnp.zeros((1, 15), jnp.int32).at[0, 4].set(place))
        return summed_loss(adapted(model, spec), {"params": params, "lora": adapters}, batch, keys)

    compiled = jit(loss)
    assert len({round(float(compiled(place)), 12) for place in range(1, 16)}) == 15
