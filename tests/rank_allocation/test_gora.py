"""GoRA's ranks, against the released code's arithmetic written down with Python's own numbers."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelora_jax import InputError, LoraSpec, gora_spec, init_adapters
from tests.rank_allocation.cases import base

SPEC = LoraSpec(target_modules=["proj", "head"], rank=4, alpha=6.0, scaling="rslora")


def gradients(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * rng.uniform(0.1, 3), jnp.float32), base())


@pytest.mark.parametrize("seed,limits", [(0, {}), (1, {"min_rank": 3, "max_rank": 5}), (2, {"max_rank": 8})])
def test_ranks_are_those_of_the_released_code(seed, limits):
    params, grads = base(), gradients(seed)
    w, g = ([*np.asarray(t["net"]["layers"]["proj"]["kernel"]), t["net"]["head"]["kernel"]] for t in (params, grads))
    names = [*(f"net.layers.{i}.proj" for i in range(3)), "net.head"]
    importance = [
        np.abs(np.asarray(a, np.float64) * np.asarray(b, np.float64)).mean() for a, b in zip(w, g, strict=True)
    ]
    widths = [math.sqrt(sum(np.shape(a))) for a in w]
    budget = sum(4 * width for width in widths)
    found = gora_spec(params, grads, SPEC, **limits)
    for name, own, width in zip(names, importance, widths, strict=True):
        rank = int(round(budget * own / sum(importance)) // width)
        rank = min(max(rank, limits.get("min_rank", 1)), limits.get("max_rank", 99))
        assert found.rank_of(name) == rank
        assert found.scale_of(name) == pytest.approx(SPEC.scale_of(name))
    of_modules = {"layers": {"proj": {"gradient": np.stack(g[:3])}}, "head": {"gradient": g[3]}}
    assert gora_spec(params, {"net": of_modules}, SPEC, **limits) == found  # as calibrate gives them
    adapters = init_adapters(jax.random.key(0), params, found)
    assert adapters["net"]["head"]["lora_a"].shape == (5, found.rank_of("net.head"))


def test_equal_importances_keep_the_rank_and_layers_left_out_have_no_share():
    alike = {"net": {"layers": {"proj": {"kernel": jnp.ones((3, 6, 5))}}}}
    spec = LoraSpec(target_modules=["proj"], rank=4, layers_to_transform=(0, 2))
    found = gora_spec(alike, alike, spec)
    assert [found.rank_of(f"net.layers.{i}.proj") for i in (0, 2)] == [3, 3]  # round(4 w) // w, w = sqrt(11)


def test_bad_input_is_refused():
    params, zeros = base(), jax.tree.map(jnp.zeros_like, base())
    with pytest.raises(InputError, match="the importances sum to 0.0: pass gradients"):
        gora_spec(params, zeros, SPEC)
    for limits in ({"min_rank": 5}, {"min_rank": 0}, {"max_rank": 3}):
        with pytest.raises(InputError, match="must hold 4, the rank of the spec"):
            gora_spec(params, gradients(), SPEC, **limits)
    with pytest.raises(InputError, match="leave rank_pattern and alpha_pattern out"):
        gora_spec(params, gradients(), replace(SPEC, rank_pattern={"head": 2}))
