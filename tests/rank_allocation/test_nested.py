"""DyLoRA and MatryoshkaLoRA: every first k ranks are an adapter."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, init_adapters
from stablelora_jax.lora.leaves import split_frozen, with_frozen
from stablelora_jax.rank_allocation import RANK_ALLOCATIONS
from stablelora_jax.rank_allocation.dylora import drawn_rank, first_ranks
from stablelora_jax.rank_allocation.matryoshka import aurac, nested_ranks, nested_sum
from stablelora_jax.rank_allocation.nested import truncate
from stablelora_jax.utils import tree
from tests.helpers import jit, long
from tests.rank_allocation.cases import SPECS, R, changes, moved

AT = ("net", "layers", "proj")


@pytest.mark.parametrize("name", ["plain", "padded", "adalora", *map(long, ("no_scale", "dora", "pissa"))])
def test_truncated_is_what_is_trained_at_each_rank(name):
    """Against the change written down, and with one compiled program for all ranks."""
    spec = SPECS[name]
    adapters = moved(spec)
    seen = jit(lambda adapters, k: first_ranks(adapters, spec, k))
    for k in range(1, R + 1):
        small, cut = truncate(jax.tree.map(np.asarray, adapters), spec, k)
        assert small["net"]["layers"]["proj"]["lora_a"].shape == (3, 6, k) and cut.rank == k
        own, trained_at = changes(small, cut), changes(seen(adapters, k), spec)
        for module, change in changes(adapters, spec, k).items():
            np.testing.assert_allclose(own[module], change, atol=1e-5)
            np.testing.assert_allclose(trained_at[module], change, atol=1e-5)
    assert seen._cache_size() == 1


@pytest.mark.parametrize("name", SPECS)
def test_the_diagonal_is_the_sum_over_nested_ranks(name):
    spec = SPECS[name]
    adapters, ranks = moved(spec), (1, 2, 4)
    found = changes(nested_sum(adapters, spec, ranks), spec)
    for module, change in found.items():
        expected = sum(changes(adapters, spec, q)[module] for q in ranks)
        np.testing.assert_allclose(change, expected, atol=1e-5)


def test_the_papers_diagonal():
    """P of S = {1, 2, 4, 8, 16} with 1 / sqrt(q), times the scale at 16."""
    spec = LoraSpec(rank=16, alpha=1.0, scaling="rslora", target_modules=["head"])
    params = {"head": {"kernel": jnp.ones((20, 20))}}
    own = RANK_ALLOCATIONS["matryoshka"](spec, 10)
    begun = jax.tree.map(jnp.ones_like, init_adapters(jax.random.key(0), params, spec))
    p = spec.scale_of("head") * own.seen(begun, None)["head"]["lora_a"][0]
    expected = [2.811, 1.811, *[1.104] * 2, *[0.604] * 4, *[0.25] * 8]
    np.testing.assert_allclose(p, expected, atol=5e-4)
    assert (np.diff(p) <= 0).all() and nested_ranks(16) == (1, 2, 4, 8, 16) and nested_ranks(12) == (1, 2, 4, 8, 12)


@pytest.mark.parametrize("name,frozen", [("plain", False), ("padded", True), long("adalora", True)])
def test_gradients_reach_the_drawn_ranks_alone(name, frozen):
    spec, k = SPECS[name], 2
    own, rest = split_frozen(moved(spec))

    @jit
    def gradients(own):
        def loss(own):
            node = tree.get_in(first_ranks(with_frozen(own, rest), spec, k, frozen), AT)
            change = jnp.matmul(node["lora_a"] * node.get("lora_e", jnp.ones((1, R)))[..., None, :], node["lora_b"])
            return (change * jnp.cos(jnp.arange(90.0)).reshape(3, 6, 5)).sum()

        return jax.grad(loss)(own)

    node = tree.get_in(gradients(own), AT)
    for layer, own_rank in ((0, R), (1, spec.rank_of("net.layers.1.proj"))):
        used = range(min(k, own_rank)) if not frozen else (min(k, own_rank) - 1,)
        for i in range(R):
            there = [node["lora_a"][layer, :, i], node["lora_b"][layer, i]]
            there += [node["lora_e"][layer, i : i + 1]] if "lora_e" in node else []
            assert all((g != 0).any() == (i in used) for g in there), (layer, i)


def test_the_rank_is_drawn_uniformly_from_the_key():
    spec = SPECS["plain"]
    drawn = jit(jax.vmap(lambda i: drawn_rank(jax.random.fold_in(jax.random.key(3), i), spec)))(jnp.arange(2000))
    counts = np.bincount(drawn, minlength=R + 1)
    assert counts[0] == 0 and len(counts) == R + 1
    assert ((counts[1:] - 500) ** 2 / 500).sum() < 16.3  # chi-squared of 3 degrees, 0.1 %


def test_aurac_is_the_trapezoid_over_log2_of_the_rank():
    values, ranks = [0.1, 0.5, 0.4, 0.9], [1, 2, 8, 16]
    expected = np.trapezoid(values, np.log2(ranks)) / np.ptp(np.log2(ranks))
    assert aurac(values, ranks) == pytest.approx(expected) and aurac([0.3], [4]) == 0.3
    for wrong in ([], [2, 1], [0, 1], [1, 1]):
        with pytest.raises(InputError, match="aurac needs a value for each of rising ranks"):
            aurac([0.1] * len(wrong), wrong)


def test_what_has_no_nested_ranks_is_refused():
    miss = replace(SPECS["plain"], parametrization="miss")
    for name in ("dylora", "matryoshka"):
        with pytest.raises(InputError, match=f"{name} orders the ranks .* parametrization lora, dora, adalora, not 'm"):
            RANK_ALLOCATIONS[name](miss, 10)
    with pytest.raises(InputError, match="truncate orders"):
        truncate({}, miss, 2)
    with pytest.raises(InputError, match="rank must be at least 1, not 0"):
        truncate(moved(SPECS["plain"]), SPECS["plain"], 0)
    for ranks in ((), (2, 2), (0, 1), (2, 5)):
        with pytest.raises(InputError, match="ranks must rise from at least 1 to at most 4, the rank"):
            RANK_ALLOCATIONS["matryoshka"](SPECS["plain"], 10, ranks=ranks)
