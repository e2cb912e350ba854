"""What an optimizer cannot use is refused where it is made, or in ``init``; what is not finite is never hidden."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablelora_jax import InputError, shrink_until_stable
from stablelora_jax.config.optimizer import adamw
from tests.helpers import jit
from tests.optimizers.members import MEMBERS

FACTORIES = {member.factory.__name__: member for member in MEMBERS.values()}
EACH = pytest.mark.parametrize("name", FACTORIES)
BAD_RATES = [
    None,
    "x",
    "1e-3",
    True,
    float("nan"),
    -1.0,
    float("inf"),
    [1],
    {},
    1e300,
    np.ones(2),
    np.float32("nan"),
    b"x",
]


def tree(seed=0, b=1.0):
    """Two pairs, with B zero or not."""
    keys = jax.random.split(jax.random.key(seed), 4)
    make = lambda i, *shape: jax.random.normal(keys[i], shape)
    return {
        "q": {"lora_a": make(0, 6, 2), "lora_b": b * make(1, 2, 5)},
        "v": {"lora_a": make(2, 6, 2), "lora_b": b * make(3, 2, 4)},
    }


@functools.cache
def compiled(name):
    """The optimizer of that name, and its update as a program of its own."""
    tx = FACTORIES[name].make(1e-3)
    return tx, jit(tx.update)


@EACH
def test_a_rate_that_is_none_is_refused_where_the_optimizer_is_made(name):
    for rate in BAD_RATES:
        with pytest.raises(InputError, match="learning_rate") as error:
            FACTORIES[name].make(rate)
        assert "\n" not in str(error.value)


@EACH
def test_every_other_number_is_checked_too(name):
    member = FACTORIES[name]
    for key, parameter in inspect.signature(member.factory).parameters.items():
        if (
            isinstance(parameter.default, float) and key != "scale"
        ):  # which may be a tree, and is looked at with the pairs
            for bad in ("x", float("nan"), -1.0, float("inf"), True):
                with pytest.raises(InputError, match=key):
                    member.make(1e-3, **{key: bad})


@EACH
def test_schedules_arrays_and_traced_rates_pass(name):
    member = FACTORIES[name]
    for rate in (0, 1e-3, np.float32(1e-3), jnp.float32(1e-3), optax.constant_schedule(1e-3)):
        jax.eval_shape(member.make(rate).init, tree())

    def moved(rate):
        tx = member.make(rate)
        return tx.update(tree(1), tx.init(tree()), tree())[0]["q"]["lora_b"].sum()

    jax.eval_shape(moved, 1e-3)
    jax.eval_shape(jax.vmap(moved), jnp.array([1e-3, 1e-2]))


NO_PAIRS = {
    "nothing": {},
    "other names": {"q": {"w_a": jnp.ones((6, 2)), "w_b": jnp.ones((2, 5))}},
    "A alone": {"q": {"lora_a": jnp.ones((6, 2))}},
    "B alone": {"q": {"lora_b": jnp.ones((2, 5))}, **{"v": tree()["v"]}},
    "ranks that differ": {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((3, 5))}},
    "one axis": {"q": {"lora_a": jnp.ones(3), "lora_b": jnp.ones(3)}},
    "rank 0": {"q": {"lora_a": jnp.ones((6, 0)), "lora_b": jnp.ones((0, 5))}},
    "whole numbers": {"q": {"lora_a": jnp.ones((6, 2), int), "lora_b": jnp.ones((2, 5), int)}},
    "text": {"q": {"lora_a": "x", "lora_b": "y"}},
    "text beside a pair": {**tree(), "x": "text"},
    "none": None,
}


@pytest.mark.parametrize("case", NO_PAIRS)
@EACH
def test_a_tree_without_whole_pairs_is_refused(name, case):
    with pytest.raises(InputError) as error:
        FACTORIES[name].make(1e-3).init(NO_PAIRS[case])
    assert "\n" not in str(error.value)


@EACH
def test_gradients_of_another_tree_and_no_parameters_are_refused(name):
    tx = FACTORIES[name].make(1e-3)
    state = tx.init(tree())
    with pytest.raises(InputError):
        tx.update(tree(1), state)
    for grads in ({"x": jnp.ones(2)}, {"q": tree()["q"]}, {**tree(), "q": {**tree()["q"], "lora_a": jnp.ones((6, 3))}}):
        with pytest.raises(InputError) as error:
            tx.update(grads, state, tree())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("b", [0.0, 1.0])
@EACH
def test_a_gradient_that_is_none_shows_in_the_update(name, b):
    tx, update = compiled(name)
    params, start = tree(b=b), tx.init(tree(b=b))
    for bad in (np.nan, np.inf):
        grads, state, finite = tree(1), start, True
        grads["q"]["lora_a"] = grads["q"]["lora_a"].at[0, 0].set(bad)
        grads["q"]["lora_b"] = grads["q"]["lora_b"].at[0, 0].set(bad)
        for _ in range(2):  # some move one factor at a time
            updates, state = update(grads, state, params)
            finite &= all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        assert not finite


@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
@EACH
def test_one_number_of_one_factor_shows_at_once(name, factor):
    """Where the rule does not look at that factor, too: AltLoRA in the other's turn, the first step of Stiefel-LoRA."""
    (tx, update), params = compiled(name), tree()
    state = tx.init(params)
    for bad in (np.nan, np.inf):
        grads = tree(1)
        grads["q"][factor] = grads["q"][factor].at[1, 1].set(bad)
        updates, _ = update(grads, state, params)
        assert any(np.isnan(leaf).any() for leaf in updates["q"].values())
        _, state = update(tree(1), state, params)


@pytest.mark.parametrize("size", [1e20, 1e-40, 0.0])
@pytest.mark.parametrize("b", [0.0, 1.0])
@EACH
def test_finite_gradients_give_finite_parameters(name, b, size):
    """Squares of 1e20 leave float32: Gram matrices are taken at a safe scale, and Adam's step over infinity is zero."""
    (tx, update), params = compiled(name), tree(b=b)
    state, grads = tx.init(params), jax.tree.map(lambda leaf: jnp.full_like(leaf, size), params)
    for _ in range(4):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_a_mask_over_every_pair_and_static_numbers_of_another_kind_are_refused():
    masked = optax.masked(FACTORIES["lora_plus"].make(1e-3), {"q": False, "v": False, "w": True})
    with pytest.raises(InputError, match="no pair to train.* masked or partition hides the rest; the tree holds w"):
        masked.init({**tree(), "w": jnp.ones(3)})
    with pytest.raises(InputError, match="q: lora_b is None, its partner is not"):
        FACTORIES["stable_lora"].make(1e-3).init({"q": {**tree()["q"], "lora_b": None}})
    for seed in ("x", None, True, 1.5, 2**63):
        with pytest.raises(InputError, match="seed must be a whole number"):
            FACTORIES["lora_pre"].make(1e-3, seed=seed)


@pytest.mark.parametrize("ratio", [None, "x", float("nan"), -1, 2, float("inf"), True, 1.0])
def test_a_shrink_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(InputError, match="shrink_ratio"):
        shrink_until_stable(optax.sgd(1e-3), shrink_ratio=ratio)


@pytest.mark.parametrize("inner", [None, "x", 3, 1e-3, {}])
def test_an_inner_optimizer_that_is_none_is_refused(inner):
    with pytest.raises(InputError):
        shrink_until_stable(inner, shrink_ratio=0.1)


@pytest.mark.parametrize("rate", BAD_RATES)
def test_the_baseline_refuses_the_same(rate):
    with pytest.raises(InputError, match="learning_rate"):
        adamw(rate)
