"""COLA and LoRA-Squeeze: the adapters change between two steps, and the optimizer begins anew."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, LoraSpec, init_adapters, merge, to_lora
from stablelora_jax.lora.leaves import is_frozen, split_frozen
from stablelora_jax.rank_allocation import RANK_ALLOCATIONS, Allocation
from stablelora_jax.rank_allocation.cola import tie_knot, with_slots
from stablelora_jax.rank_allocation.restart import restart, restartable
from stablelora_jax.rank_allocation.squeeze import squeezed
from stablelora_jax.utils import tree
from tests.helpers import jit, largest_difference, long
from tests.rank_allocation.cases import SPECS, R, base, changes, moved

STACK = ("net", "layers", "proj")


def tied_changes(adapters, spec, slots):
    """``s (A B + the tied pairs)``, of the padded columns alone, written down anew."""
    own, found = split_frozen(adapters)[0], changes(split_frozen(adapters)[0], spec)
    for path in (STACK, ("net", "head")):
        a, b = (np.asarray(tree.get_in(adapters, path)[n], np.float64) for n in ("frozen_a", "frozen_b"))
        names = [f"net.layers.{i}.proj" for i in range(3)] if path == STACK else ["net.head"]
        for i, name in enumerate(names):
            one = (a[i], b[i]) if path == STACK else (a, b)
            assert one[0].shape[1] == slots * tree.get_in(own, path)["lora_a"].shape[-1]
            found[name] = found[name] - spec.scale_of(name) * one[0] @ one[1]
    return found


@pytest.mark.parametrize("name", ["plain", "padded", long("no_scale"), long("dora")])
def test_a_knot_keeps_the_function_and_draws_the_pair_anew(name):
    """Twice, so that both slots are used; the last adapter is LoRA of rank 3 r for every other program."""
    spec, params = SPECS[name], base()
    own = RANK_ALLOCATIONS["cola"](spec, 30, length=3)
    assert list(own.restarts) == [10, 20]
    first = moved(spec)
    adapters = own.start(first)
    np.testing.assert_equal(tied_changes(adapters, spec, 2), changes(first, spec))
    for number, (step, change) in enumerate(own.restarts.items()):
        before, key = tied_changes(adapters, spec, 2), jax.random.key(step)
        pair = tree.get_in(adapters, STACK)
        adapters = change(adapters, key, None)
        after = tied_changes(adapters, spec, 2)
        for module in before:
            np.testing.assert_allclose(after[module], before[module], rtol=1e-12, atol=1e-12)
        node, at = tree.get_in(adapters, STACK), slice(number * R, (number + 1) * R)
        np.testing.assert_array_equal(node["frozen_a"][..., at], pair["lora_a"])
        np.testing.assert_array_equal(node["frozen_b"][:, at], -pair["lora_b"])
        new = tree.get_in(init_adapters(key, params, replace(spec, parametrization="lora")), STACK)
        np.testing.assert_array_equal(node["lora_a"], new["lora_a"])
        assert not node["lora_b"].any()
        adapters = jax.tree_util.tree_map_with_path(
            lambda at, x: x if is_frozen(at[-1].key) else x + jnp.where(x == 0, 0, 0.1), adapters
        )
    kept = [tied_changes(adapters, spec, 2), changes(*own.finished(adapters, spec))]
    for module in kept[0]:
        np.testing.assert_allclose(kept[1][module], kept[0][module], atol=1e-5)


def test_a_chain_is_what_the_model_computes():
    """Through merge, ``to_lora``, and a module that does not fill its slots."""
    spec, params = SPECS["padded"], base()
    adapters = tie_knot(with_slots(moved(spec), spec, 2), spec, 0, jax.random.key(1))
    for found, own in (
        (adapters, spec),
        to_lora(adapters, spec),
        RANK_ALLOCATIONS["cola"](spec, 9).finished(adapters, spec),
    ):
        whole = merge(params, found, own)["net"]["layers"]["proj"]["kernel"] - params["net"]["layers"]["proj"]["kernel"]
        expected = tied_changes(adapters, spec, 2)
        for i in range(3):
            np.testing.assert_allclose(whole[i], expected[f"net.layers.{i}.proj"], atol=1e-5)
    plain, plain_spec = to_lora(adapters, spec)
    used = plain_spec.rank_of("net.layers.1.proj")
    assert used == 3 and not tree.get_in(plain, STACK)["lora_a"][1, :, used:].any()  # what a file holds of this layer
    assert own.rank_of("net.layers.1.proj") == 1 and own.rank_of("net.head") == 3


def test_a_chain_of_one_is_lora():
    assert RANK_ALLOCATIONS["cola"](SPECS["plain"], 30, length=1) == Allocation()


def test_an_embedding_is_drawn_as_one():
    """A = 0 and B normal, as ``init_adapters`` draws it, where the base tells that it is one."""
    params = {"embed": {"embedding": jnp.ones((9, 4))}}
    spec = LoraSpec(target_modules=["embed"], rank=2)
    begun = with_slots(init_adapters(jax.random.key(0), params, spec), spec, 1)
    new = tie_knot(begun, spec, 0, jax.random.key(7), params=params)["embed"]
    assert largest_difference(new["lora_b"], init_adapters(jax.random.key(7), params, spec)["embed"]["lora_b"]) == 0
    assert new["lora_b"].any() and not new["lora_a"].any()


@pytest.mark.parametrize("name", ["plain", "padded"])
def test_a_squeeze_drops_the_smallest_singular_values_alone(name):
    """Eckart and Young; what is not in use is zero in both factors, and a rank that suffices loses nothing."""
    spec, k = SPECS[name], 2
    adapters = moved(spec)
    found, before = squeezed(adapters, spec, k), changes(adapters, spec)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, adapters)
    for module, change in changes(found, spec).items():
        values = np.linalg.svd(before[module], compute_uv=False)
        error = np.linalg.norm(before[module] - change)
        np.testing.assert_allclose(error, np.sqrt((values[k:] ** 2).sum()), atol=1e-5)
        np.testing.assert_allclose(np.linalg.svd(change, compute_uv=False)[:k], values[:k], rtol=1e-4, atol=1e-5)
    node = tree.get_in(found, STACK)
    assert not node["lora_a"][..., k:].any() and not node["lora_b"][:, k:].any()
    if name == "padded":
        assert not node["lora_a"][1, :, 1:].any() and not node["lora_b"][1, 1:].any()
    for module, change in changes(squeezed(adapters, spec, R), spec).items():
        np.testing.assert_allclose(change, before[module], atol=1e-5)


def test_a_rank_without_a_singular_value_can_be_trained():
    """At a squeeze where B is zero, A keeps its columns; otherwise neither factor would ever get a gradient."""
    spec = SPECS["padded"]
    begun = init_adapters(jax.random.key(0), base(), spec)
    node, was = (tree.get_in(t, STACK) for t in (squeezed(begun, spec, 2), begun))
    np.testing.assert_array_equal(node["lora_a"][..., :2], was["lora_a"][..., :2])
    assert not node["lora_b"].any() and not node["lora_a"][..., 2:].any()


def test_ranks_fall_geometrically_in_equal_parts_of_the_steps():
    spec = LoraSpec(target_modules=["proj"], rank=64)
    own = RANK_ALLOCATIONS["squeeze"](spec, 400, target_rank=8)
    drawn = jnp.asarray(np.random.default_rng(0).normal(size=(70, 64)), jnp.float32)
    adapters = {"proj": {"lora_a": drawn, "lora_b": drawn[::-1].T}}
    ranks = {}
    for step, change in own.restarts.items():
        adapters = change(adapters, None, None)
        ranks[step] = int((adapters["proj"]["lora_a"] != 0).any(0).sum())
    assert ranks == {100: 32, 200: 16, 300: 8}
    small, cut = own.finished(adapters, spec)
    assert small["proj"]["lora_a"].shape == (70, 8) and cut.rank == 8 and cut.scale_of("proj") == spec.scale_of("proj")
    assert list(RANK_ALLOCATIONS["squeeze"](spec, 90, target_rank=8, squeezes=1).restarts) == [45]


def test_a_restart_resets_all_but_the_schedule():
    """Against two optimizers, one after another, whose schedule has both of their updates."""
    schedule = optax.cosine_decay_schedule(0.1, 10)
    make = lambda began: optax.adamw(lambda count: schedule(count + began))
    tx = restartable(make)
    params, rng = {"w": jnp.ones(4)}, np.random.default_rng(0)
    state, expected = tx.init(params), make(0).init(params)
    update, of = jit(tx.update), 0
    for t in range(7):
        if t == 3:
            state, expected, of = restart(tx, state, params), make(0).init(params), 3
            assert int(state.began) == 3 and not np.any(np.asarray(state.inner[0].mu["w"]))
        grads = {"w": jnp.asarray(rng.normal(size=4), jnp.float32)}
        updates, state = update(grads, state, params)
        direct, expected = make(of).update(grads, expected, params)
        np.testing.assert_allclose(updates["w"], direct["w"], rtol=1e-5)
        params = optax.apply_updates(params, updates)


def test_what_has_no_meaning_is_refused():
    cola, squeeze, spec = RANK_ALLOCATIONS["cola"], RANK_ALLOCATIONS["squeeze"], SPECS["plain"]
    for init in ("pissa", "init_ab", "init_ab_off", "eva"):
        with pytest.raises(InputError, match="cola draws pairs anew .* say init: kaiming, gaussian, init_b, ortho"):
            cola(replace(spec, init=init), 10)
    with pytest.raises(InputError, match="cola keeps tied pairs .* parametrization lora and dora, not 'slora'"):
        cola(replace(spec, parametrization="slora"), 10)
    for length in (0, 11):
        with pytest.raises(InputError, match=r"length must be in \[1, 10\], the steps"):
            cola(spec, 10, length=length)
    with pytest.raises(InputError, match="net.head has no slot 1 for a tied pair"):
        tie_knot(with_slots(moved(spec), spec, 1), spec, 1, jax.random.key(0))
    with pytest.raises(InputError, match="squeeze cuts a plain pair .* parametrization lora, not 'dora'"):
        squeeze(SPECS["dora"], 10)
    with pytest.raises(InputError, match="squeeze cuts A B, from which init 'pissa' subtracts its start"):
        squeeze(SPECS["pissa"], 10)
    for rank in (0, 4):
        with pytest.raises(InputError, match=r"target_rank must be in \[1, 4\), below the rank"):
            squeeze(spec, 10, target_rank=rank)
    for options in ({"squeezes": 0}, {"squeezes": 3, "target_rank": 2}):
        with pytest.raises(InputError, match="it cannot fall"):
            squeeze(spec, 10, **options)
    with pytest.raises(InputError, match="rank must be at least 1, not 0"):
        squeezed(moved(spec), spec, 0)
